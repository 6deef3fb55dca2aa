"""What several samples of one question say together: pass@k, majorities, lengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_BINS = 16


@dataclass(frozen=True)
class Sample:
    """One judged answer; `answer` is None where a text gives none."""

    correct: bool
    answer: str | None


def powers_of_two(limit: int) -> list[int]:
    """2, 4, 8 and so on, as far as `limit` reaches."""
    return [2**power for power in range(1, limit.bit_length()) if 2**power <= limit]


def pass_at(k: int, num_samples: int, num_correct: int) -> float:
    """The probability that one of k samples, drawn from all without replacement, is right.

    The unbiased estimate of arXiv 2107.03374, section 2.1.
    """
    assert 1 <= k <= num_samples
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def classes(samples: Sequence[Sample], same: Callable[[str, str], bool]) -> list[int | None]:
    """The class of each sample's answer: equal numbers mean the same; None has no answer.

    All right answers are one class. A wrong one belongs to the first class whose first answer it
    is the same as, `same(first, answer)`.
    """
    found: list[int | None] = []
    firsts: list[Sample] = []
    written: dict[tuple[bool, str], int] = {}
    for sample in samples:
        if sample.answer is None:
            found.append(None)
            continue
        written_as = (sample.correct, sample.answer)
        if written_as not in written:
            written[written_as] = next(
                (
                    number
                    for number, first in enumerate(firsts)
                    if first.correct == sample.correct
                    and (sample.correct or same(first.answer or "", sample.answer))
                ),
                len(firsts),
            )
            if written[written_as] == len(firsts):
                firsts.append(sample)
        found.append(written[written_as])
    return found


def majority(votes: Sequence[int | None]) -> int | None:
    """The class with most votes, of several the one that was voted for first; None: no votes."""
    counts: dict[int, int] = {}
    for vote in votes:
        if vote is not None:
            counts[vote] = counts.get(vote, 0) + 1
    # A dictionary keeps the order of first votes, and max takes the first of equals.
    return max(counts, key=counts.__getitem__, default=None)


def majority_at(k: int, samples: Sequence[Sample], votes: Sequence[int | None]) -> float:
    """The share of right majorities among the groups of k samples that follow one another.

    Samples that fill no group are left out. A group without any answer is wrong.
    """
    right = {
        vote
        for vote, sample in zip(votes, samples, strict=True)
        if sample.correct and vote is not None
    }
    groups = [votes[start : start + k] for start in range(0, len(votes) - k + 1, k)]
    return sum(majority(group) in right for group in groups) / len(groups)


def quantile(values: Sequence[int], share: float) -> float:
    """The value below which a share of the values lies, linear between two of them."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def by_length(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How many answers are how long, and how many of these are right; bins of one width.

    A bin holds lengths in tokens from `from`, to less than `to`.
    """
    width = max(record["num_tokens"] for record in records) // _BINS + 1
    counts: dict[int, list[int]] = {}
    for record in records:
        count = counts.setdefault(record["num_tokens"] // width, [0, 0])
        count[0] += 1
        count[1] += bool(record["correct"])
    return [
        {
            "from": number * width,
            "to": (number + 1) * width,
            "samples": counts.get(number, [0, 0])[0],
            "correct": counts.get(number, [0, 0])[1],
        }
        for number in range(max(counts) + 1)
    ]
