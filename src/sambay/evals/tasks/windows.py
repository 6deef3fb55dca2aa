"""A window that slides over a long document, and means of what it finds there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sambay.evals.calls import Passage

FIRST_EDGE = 64
"""Positions are reported up to this one, and from there by powers of two."""


@dataclass(frozen=True)
class Piece:
    """Tokens [start, end) of a document, read behind [begin, start).

    is_first: the window scores its own first token, so the prefix must stand before it.
    """

    begin: int
    start: int
    end: int
    is_first: bool

    def passage(self, tokens: Sequence[int], prefix_id: int) -> Passage:
        """What is scored, and what it is read behind."""
        prefix = (prefix_id,) if self.is_first else ()
        context = (*prefix, *tokens[self.begin : self.start])
        return Passage(context, tuple(tokens[self.start : self.end]))


def bucket(position: int) -> tuple[int, int]:
    """The range of positions, from and up to, that a position is reported in."""
    edge = FIRST_EDGE
    while edge <= position:
        edge *= 2
    return (0 if edge == FIRST_EDGE else edge // 2), edge


def pieces(num_tokens: int, length: int, stride: int) -> list[Piece]:
    """Pieces that cover a document once.

    The first window is the first `length` tokens. Each further one scores the next `stride` tokens,
    behind `length` - `stride` others. Windows are divided at the edges of `bucket`, which changes
    what is read before no token: the sum stays the same, and says more.
    """
    assert 1 <= stride <= length
    found: list[Piece] = []
    start, end = 0, min(length, num_tokens)
    while start < end:
        begin = start - (length - stride) if start else 0
        is_first = begin == start
        while start < end:
            found.append(Piece(begin, start, min(end, bucket(start)[1]), is_first))
            start = found[-1].end
        end = min(start + stride, num_tokens)
    return found


def ratio(parts: Sequence[tuple[float, float]]) -> tuple[float, float | None]:
    """The sum of the first numbers over that of the second, and its standard error.

    The error is that of a ratio of sums over independent parts of different sizes; None for one.
    """
    total = math.fsum(weight for _, weight in parts)
    value = math.fsum(amount for amount, _ in parts) / total
    count = len(parts)
    if count < 2:
        return value, None
    spread = math.fsum((amount - value * weight) ** 2 for amount, weight in parts)
    return value, math.sqrt(spread * count / (count - 1)) / total
