"""Passages in batches of fixed shapes, so that no score depends on what is scored beside it.

Matrix products round differently in other shapes. With shapes that depend on a passage's own
length only, an evaluation that is interrupted and resumed gives the same bits.

Shape letters: B rows, T columns, P positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sambay.errors import ConfigError
from sambay.evals.calls import Passage, Score

POSITIONS = 128
"""Positions per pass through the head: bounds the logits, whatever the vocabulary."""

_SMALLEST = 8


@dataclass
class Row:
    """What one row of a batch computes.

    ids: all tokens but the last; the last `count` positions predict the continuation.
    users: the passages it serves, with their last tokens; they differ in that at most.
    """

    ids: tuple[int, ...]
    count: int
    users: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class ScoreBatch:
    """Rows of at most `width` columns, of which at most the last `span` predict something.

    num_rows: rows of the batch's shape, of which the surplus is filled with copies.
    """

    rows: list[Row]
    num_rows: int
    width: int
    span: int

    @property
    def first(self) -> int:
        """The lowest place in a row's `ids` that can predict something, for any row that fits."""
        shortest = 1 if self.width <= _SMALLEST else self.width - _step(self.width) + 1
        return max(0, shortest - self.span)

    def right_aligned(self) -> tuple[Tensor, Tensor]:
        """Token ids, (B, T), that end together, and the columns of padding before each row."""
        ids_BT = torch.zeros(self.num_rows, self.width, dtype=torch.int64)
        starts = []
        for number in range(self.num_rows):
            ids = self.rows[number % len(self.rows)].ids
            ids_BT[number, self.width - len(ids) :] = torch.tensor(ids)
            starts.append(self.width - len(ids))
        return ids_BT, torch.tensor(starts)

    def left_aligned(self) -> Tensor:
        """Token ids, (B, T), that begin together."""
        ids_BT, starts = self.right_aligned()
        rows = [row.roll(-int(start)) for row, start in zip(ids_BT, starts, strict=True)]
        return torch.stack(rows)


def plan_scores(
    passages: Sequence[Passage],
    *,
    vocab_size: int,
    max_context: int | None,
    tokens_per_call: int,
    max_rows: int | None = None,
) -> list[ScoreBatch]:
    """Passages grouped into batches of similar length, the longest first.

    Passages that differ in their last token at most share a row.

    Raises:
        ConfigError: a passage without context or continuation, with a token outside the
            vocabulary, or longer than the model's context.
    """
    rows: dict[tuple[tuple[int, ...], int], Row] = {}
    for number, passage in enumerate(passages):
        _check(passage, number, vocab_size, max_context)
        ids, count = (*passage.context, *passage.continuation[:-1]), len(passage.continuation)
        row = rows.setdefault((ids, count), Row(ids, count))
        row.users.append((number, passage.continuation[-1]))
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows.values():
        width = _rounded_up(len(row.ids))
        span = min(width, max(_SMALLEST, 1 << (row.count - 1).bit_length()))
        groups.setdefault((width, span), []).append(row)
    batches = []
    for (width, span), members in sorted(groups.items(), key=lambda item: item[0], reverse=True):
        num_rows = max(1, min(tokens_per_call // width, max_rows or tokens_per_call))
        batches += [
            ScoreBatch(members[begin : begin + num_rows], num_rows, width, span)
            for begin in range(0, len(members), num_rows)
        ]
    return batches


class Tally:
    """Collects the log-probabilities of a batch, position by position.

    head: (P, D) hidden states or logits to (P, V) logits; always called with `POSITIONS` of them.
    """

    def __init__(self, batch: ScoreBatch, head: Callable[[Tensor], Tensor]) -> None:
        self._batch = batch
        self._head = head
        self._sums: list[list[float]] = [[] for _ in batch.rows]
        self._greedy = [True] * len(batch.rows)
        self._last: dict[int, tuple[float, bool]] = {}

    def add(self, states: Tensor, first: Sequence[int]) -> None:
        """Take in what the model computed for some columns, (B, columns, D).

        first: for every row, the place in its `ids` of the first of these columns; may be
            negative where there is padding.
        """
        places = [
            (number, column)
            for number, row in enumerate(self._batch.rows)
            for column in range(states.shape[1])
            if len(row.ids) - row.count <= first[number] + column < len(row.ids)
        ]
        for begin in range(0, len(places), POSITIONS):
            self._add(states, first, places[begin : begin + POSITIONS])

    def _add(self, states: Tensor, first: Sequence[int], places: Sequence[tuple[int, int]]) -> None:
        rows_P, columns_P = torch.tensor(places, device=states.device).T
        chosen_PD = states[rows_P, columns_P]
        filler = (0, 0, 0, POSITIONS - len(places))
        logits_PV = self._head(torch.nn.functional.pad(chosen_PD, filler))[: len(places)].float()
        norm_P, best_P = logits_PV.logsumexp(-1), logits_PV.argmax(-1).tolist()
        for place, (number, column) in enumerate(places):
            row = self._batch.rows[number]
            behind = first[number] + column + 1
            if behind < len(row.ids):
                token = row.ids[behind]
                self._sums[number].append(float(logits_PV[place, token] - norm_P[place]))
                self._greedy[number] &= best_P[place] == token
                continue
            for user, token in row.users:
                logprob = float(logits_PV[place, token] - norm_P[place])
                self._last[user] = (logprob, best_P[place] == token)

    def scores(self) -> list[tuple[int, Score]]:
        """Every passage of the batch with its score.

        Raises:
            ConfigError: the model's output is not a number.
        """
        found = []
        for number, row in enumerate(self._batch.rows):
            assert len(self._sums[number]) == row.count - 1, "a position is missing"
            for user, _ in row.users:
                logprob, is_best = self._last[user]
                total = math.fsum([*self._sums[number], logprob])
                if not math.isfinite(total):
                    raise ConfigError(
                        f"the model's output for passage {user} is not a number; its weights are "
                        "damaged or overflow in this dtype"
                    )
                found.append((user, Score(total, self._greedy[number] and is_best)))
        return found


def _check(passage: Passage, number: int, vocab_size: int, max_context: int | None) -> None:
    if not passage.context or not passage.continuation:
        raise ConfigError(
            f"passage {number} has no {'continuation' if passage.context else 'context'}; begin a "
            "text with the backend's prefix_id, and score at least one token behind it"
        )
    length = len(passage.context) + len(passage.continuation)
    if max_context is not None and length > max_context:
        raise ConfigError(
            f"passage {number} has {length} tokens, the model's context is {max_context}; ask for "
            "less, or raise the limit with --max-context if the model can take it"
        )
    for part in (passage.context, passage.continuation):
        if min(part) < 0 or max(part) >= vocab_size:
            raise ConfigError(
                f"passage {number} holds a token outside the model's vocabulary of {vocab_size}; "
                "use the tokenizer that belongs to the model"
            )


def _rounded_up(length: int) -> int:
    """The next of 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, ...: at most a quarter more."""
    if length <= _SMALLEST:
        return _SMALLEST
    step = _step(length)
    return -(-length // step) * step


def _step(length: int) -> int:
    return 1 << max(0, (length - 1).bit_length() - 3)
