"""Means with their standard errors, and what several samples of one question say together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """A number with its uncertainty.

    value: a share from 0 to 1 for accuracies, else what the name says.
    stderr: one standard error; None where the sample does not give one.
    count: how many independent items it is the mean of.
    """

    value: float
    stderr: float | None
    count: int

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


def mean(values: Sequence[float]) -> Metric:
    """The mean of independent values, with the standard error of a sample."""
    assert values, "a mean of nothing"
    count = len(values)
    average = math.fsum(values) / count
    if count == 1:
        return Metric(average, None, 1)
    variance = math.fsum((value - average) ** 2 for value in values) / (count - 1)
    return Metric(average, math.sqrt(variance / count), count)


def mean_of_groups(groups: Mapping[Any, Sequence[float]]) -> Metric:
    """The mean over questions of each one's mean, where a question has several samples.

    Samples of one question are not independent, so the standard error is that of the questions'
    means and `count` is the number of questions.
    """
    return mean([math.fsum(values) / len(values) for values in groups.values()])


def average(parts: Sequence[Metric]) -> Metric:
    """The mean of independent metrics, each with the same weight; `count` is of all their items."""
    value = math.fsum(part.value for part in parts) / len(parts)
    errors = [part.stderr for part in parts if part.stderr is not None]
    stderr = None
    if len(errors) == len(parts):
        stderr = math.sqrt(math.fsum(error**2 for error in errors)) / len(parts)
    return Metric(value, stderr, sum(part.count for part in parts))


def population_deviation(values: Sequence[float]) -> float:
    """The standard deviation with all of n in the denominator."""
    average = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - average) ** 2 for value in values) / len(values))
