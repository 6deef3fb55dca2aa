"""Which source each row of training comes from: arithmetic of the row's number, by weight.

Rows are numbered over the whole run: row r of step n is p = n * G + r. Weights are whole numbers
a_s of D parts (D is their sum), and the sources of D rows in a row form a pattern that repeats, so
the source of row p, and how many rows that source had before it, are two look-ups at p mod D.

The pattern keeps every source within one row of its share at every prefix, as no random choice
does: item j of source s may take places floor((j - 1) D / a_s) to ceil(j D / a_s) - 1, and the item
whose last place comes first goes next. A pattern with that property exists for all weights
(Tijdeman, "The chairman assignment problem", 1980), and earliest deadline first finds it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import reduce

import numpy as np

from sambay.errors import ConfigError

PARTS = 1_000_000  # weights count in millionths, so the longest pattern has that many rows


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """The weights as the smallest whole numbers in the same proportion, to a millionth each.

    Raises:
        ConfigError: a weight that is not positive or below a millionth, or a sum that is not 1.
    """
    for weight in weights:
        if not (math.isfinite(weight) and weight * PARTS >= 1):
            raise ConfigError(
                f"data.mixture has a weight of {weight:g}; weights must be at least {1 / PARTS:g}"
            )
    total = math.fsum(weights)
    # The tolerance is for weights that were rounded, such as three times 0.333333.
    if abs(total - 1) > 1.0000001e-6:
        raise ConfigError(
            f"the weights of data.mixture sum to {total:.9g}; they must sum to 1: divide each of "
            "them by that"
        )
    exact = [Fraction(weight).limit_denominator(PARTS) for weight in weights]
    parts = _whole([fraction.as_integer_ratio() for fraction in exact])
    rounded = any(abs(float(f) - w) > 1e-12 for f, w in zip(exact, weights, strict=True))
    if rounded or sum(parts) > PARTS:
        millionths = _largest_remainders([weight / total * PARTS for weight in weights])
        parts = _whole([(part, 1) for part in millionths])
    return tuple(parts)


def _whole(ratios: list[tuple[int, int]]) -> list[int]:
    """The smallest whole numbers in the proportion of these fractions."""
    common = reduce(math.lcm, (below for _, below in ratios))
    parts = [above * (common // below) for above, below in ratios]
    divisor = reduce(math.gcd, parts)
    return [part // divisor for part in parts]


def _largest_remainders(exact: list[float]) -> list[int]:
    """Whole numbers, each within one of the exact part and at least 1, that sum to `PARTS`.

    The sum is larger by as many as had to be raised to 1.
    """
    parts = [math.floor(part) for part in exact]
    order = sorted(range(len(exact)), key=lambda number: (parts[number] - exact[number], number))
    for number in order[: PARTS - sum(parts)]:
        parts[number] += 1
    return [max(part, 1) for part in parts]


class Interleave:
    """The sources of all rows.

    Attributes:
        weights: whole numbers; a source has exactly that many of every `period` rows.
        period: their sum.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """See `whole_weights` for the errors raised."""
        self.weights = whole_weights(weights)
        self.period = sum(self.weights)
        self._sources = _pattern(self.weights)
        self._before = np.empty(self.period, np.int64)
        for source in range(len(self.weights)):
            own = np.flatnonzero(self._sources == source)
            self._before[own] = np.arange(len(own))

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of each source that is aimed at."""
        return tuple(weight / self.period for weight in self.weights)

    def assign(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For rows p (int64): the source of each, and the number of its rows before p."""
        cycles, places = np.divmod(rows, self.period)
        sources = self._sources[places]
        own = np.array(self.weights, np.int64)[sources]
        return sources, cycles * own + self._before[places]

    def counts(self, rows: int) -> np.ndarray:
        """How many of the first `rows` rows each source has, int64."""
        cycles, rest = divmod(rows, self.period)
        begun = np.bincount(self._sources[:rest], minlength=len(self.weights))
        return np.array(self.weights, np.int64) * cycles + begun


def _pattern(weights: Sequence[int]) -> np.ndarray:
    """The source of each place of one period."""
    period = sum(weights)
    if len(weights) == 1:
        return np.zeros(period, np.int64)
    items = [np.arange(weight, dtype=np.int64) for weight in weights]
    first = np.concatenate([own * period // w for own, w in zip(items, weights, strict=True)])
    end = np.concatenate(
        [-(-(own + 1) * period // w) for own, w in zip(items, weights, strict=True)]
    )
    sources = np.repeat(np.arange(len(weights)), weights)
    order = np.argsort(first, kind="stable")
    arrivals = zip(first[order].tolist(), end[order].tolist(), sources[order].tolist(), strict=True)
    waiting: list[tuple[int, int]] = []
    arrival = next(arrivals, None)
    pattern = np.empty(period, np.int64)
    for place in range(period):
        while arrival is not None and arrival[0] <= place:
            heapq.heappush(waiting, arrival[1:])
            arrival = next(arrivals, None)
        end_of_item, pattern[place] = heapq.heappop(waiting)
        assert end_of_item > place
    return pattern
