"""What the paper measured with Phonebook, as points to lay one's own beside."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from sambay.evals.published import published_tables

METRIC = "accuracy@"  # and the entries of the book
TRAINED_PAIRS = 1850  # 32K tokens of Llama 2, the rows that the paper's models are trained on
_TABLES = ("phonebook", "phonebook_windows")


@dataclass(frozen=True)
class PublishedPoint:
    """The accuracy of one model at one length, and the deviation of its four groups.

    window: of its window attention; None for a model without.
    """

    model: str
    window: int | None
    pairs: int
    accuracy: float
    deviation: float | None


@functools.cache
def published_points() -> tuple[PublishedPoint, ...]:
    """The points of table 8, and those of figure 3 that are known as numbers, each once."""
    points = {}
    for table in map(published_tables().__getitem__, _TABLES):
        for row in table.rows:
            for column, percent, deviation in zip(
                table.columns, row.values, row.deviations, strict=True
            ):
                assert column.metric is not None
                pairs = int(column.metric.removeprefix(METRIC))
                if percent is not None:
                    points[row.model, row.window, pairs] = PublishedPoint(
                        row.model,
                        row.window,
                        pairs,
                        percent / 100,
                        None if deviation is None else deviation / 100,
                    )
    return tuple(points.values())
