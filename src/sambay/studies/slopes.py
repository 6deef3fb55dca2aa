"""How steeply each quantity of a coordinate check grows with size, and how it should."""

from __future__ import annotations

import math
from collections.abc import Iterable

from sambay.spec import InitScheme, Parametrization
from sambay.studies.coordinates import Measure, Reading, Sweep
from sambay.studies.probes import LARGEST_ATTENTION_LOGIT, LOGITS, RESIDUAL

FLAT = 0.1  # the slope up to which a quantity counts as flat
# What blocks add to the residual stream; all else in a block is a function of a norm's output.
_INTO_RESIDUAL = (
    "mamba",
    "mamba2",
    "gated delta",
    "window attention",
    "full attention",
    "gated memory unit",
    "cross-attention",
    "MLP",
)

Slopes = dict[Parametrization, dict[str, float]]


def slopes(readings: Iterable[Reading], sweep: Sweep, measure: Measure, step: int) -> Slopes:
    """The slope of log value against log size, of the mean over seeds of the log, by quantity.

    The size is the depth in a sweep of depths, the width otherwise. NaN where a value is 0 or not
    finite, which has no logarithm.
    """
    grouped: dict[tuple[Parametrization, str], dict[int, list[float]]] = {}
    for one in readings:
        if one.measure is measure and one.step == step:
            size = one.depth if sweep is Sweep.DEPTH else one.width
            by_size = grouped.setdefault((one.parametrization, one.quantity), {})
            by_size.setdefault(size, []).append(one.value)
    found: Slopes = {}
    for (parametrization, quantity), by_size in grouped.items():
        found.setdefault(parametrization, {})[quantity] = log_slope(by_size)
    return found


def log_slope(values_by_size: dict[int, list[float]]) -> float:
    """The least-squares slope of mean log value against log size; NaN if a log does not exist."""
    if not all(0 < value < math.inf for values in values_by_size.values() for value in values):
        return math.nan
    x = [math.log(size) for size in values_by_size]
    y = [math.fsum(map(math.log, values)) / len(values) for values in values_by_size.values()]
    x_mean, y_mean = math.fsum(x) / len(x), math.fsum(y) / len(y)
    covariance = math.fsum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return covariance / math.fsum((a - x_mean) ** 2 for a in x)


def expected_slope(
    sweep: Sweep,
    measure: Measure,
    quantity: str,
    step: int,
    init_scheme: InitScheme = InitScheme.MUP_PUBLISHED,
) -> float | None:
    """The slope that muP++ promises for a large model; None where it promises none.

    Almost everything is flat. What is not:
    - Logits are a sum over the width that muP divides by the width. What is learned adds up in
      phase, but the first, random embedding gives -1/2 in width, which fades as training goes on.
    - muP++ lets the rate of all parameters fall with the root of the depth, because as many times
      two matrices as there are layers add up in the residual stream. What a single weight (also the
      embedding and head, of which there is only one) learns therefore has -1/2 in depth.
    - The released first weights divide the matrices into the residual stream by sqrt(2 depth) once
      more than the published table, so mixers begin with -1/2 in depth, and the stream with less
      and less beside the embedding.
    - The largest of many attention logits grows with their number.
    """
    deepens = sweep is not Sweep.WIDTH
    if quantity == LARGEST_ATTENTION_LOGIT:
        return None
    if quantity == LOGITS:
        is_first = measure is Measure.LEVEL and step == 0
        return (0.0 if sweep is Sweep.DEPTH else -0.5) if is_first else None
    if not deepens:
        return 0.0
    if measure is Measure.UPDATE or (measure is Measure.CHANGE and quantity == "embedding"):
        return -0.5
    if init_scheme is InitScheme.MUP_RELEASED:
        if quantity in _INTO_RESIDUAL:
            return -0.5 if step == 0 else None
        if quantity in RESIDUAL.values():
            return None
    return 0.0
