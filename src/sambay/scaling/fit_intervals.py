"""Confidence intervals of a fitted law that hold for five points and three constants.

With two degrees of freedom the residuals say little about the noise, so an interval of plus or
minus two standard errors covers far less than 95 %. Both intervals here allow for that:

* profile: the values at which the best curve through them fits worse by no more than the F
  distribution with (1, freedom) allows. It follows the curve's shape, which errors from the
  Jacobian cannot (C cannot be negative).
* bootstrap: new losses from the fitted curve plus normal noise, whose deviation is itself drawn
  for each table (sigma times root(freedom / chi-squared)); for a straight model this gives
  Student's interval exactly. Resampling the residuals, or two seeds, would take the small sample's
  spread for the truth and cover too little.

Simulated with planted constants on designs of 5 and 6 points, with one and two seeds, both cover
between 90 and 99 % (tests/scaling).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sambay.scaling.fit import PowerLaw, student_quantile
from sambay.scaling.fit_solver import (
    LARGEST_EXPONENT,
    SMALLEST_EXPONENT,
    Array,
    Fits,
    Fixed,
    Quantity,
    fit_rows,
)

Mask = NDArray[np.bool_]

LEVEL = 0.95
DRAWS = 4000
_WIDENINGS = 40
_SECTIONS = 32  # five times: 3e-8 of the first step
_REFINEMENTS = 5


@dataclasses.dataclass(frozen=True)
class Interval:
    """From `low` to `high`; an infinite end is one that the data do not bound."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def profile_interval(
    law: PowerLaw, quantity: Quantity, *, at: float = 1.0, level: float = LEVEL
) -> Interval:
    """The profile-likelihood interval of A, b, C or of the loss at D = `at`.

    An end at a bound of the constants (C = 0, C = the least loss, b = 1e-6, b = 2) means that the
    data do not exclude anything up to there.
    """
    estimate = _value(law, quantity, at)
    if law.noise.sigma == 0:
        return Interval(estimate, estimate)
    losses = np.array(law.points.losses)[None]
    least = float(fit_rows(law.x, losses).rss[0])
    allowed = least + law.noise.sigma**2 * student_quantile(level, law.noise.freedom) ** 2

    def is_inside(values: Array) -> Mask:
        held = Fixed(quantity, values, at)
        return fit_rows(law.x, np.repeat(losses, len(values), axis=0), held).rss <= allowed

    bottom, top = _bounds(law, quantity)
    step = law.errors.get(quantity.value, 0.0) or 1e-3 * abs(estimate) or 1e-9
    return Interval(
        _edge(is_inside, estimate, -step, bottom), _edge(is_inside, estimate, step, top)
    )


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """Fits to tables drawn from a law; `losses` gives their predictions."""

    fits: Fits

    def interval(self, quantity: Quantity, *, level: float = LEVEL) -> Interval:
        """The percentile interval of A, b or C."""
        return percentiles(getattr(self.fits, quantity.value), level)

    def band(self, x: Array, *, level: float = LEVEL) -> tuple[Array, Array]:
        """Lower and upper ends of the loss at each of the points x, (M,) each."""
        tails = [(1 - level) / 2, (1 + level) / 2]
        low, high = np.quantile(self.fits.predict(x), tails, axis=0)
        return low, high


def bootstrap(law: PowerLaw, *, draws: int = DRAWS, seed: int = 0) -> Bootstrap:
    """Fits to `draws` tables of the same design; the same seed gives the same fits."""
    generator = np.random.default_rng(seed)
    noise = law.noise.sigma * noise_scale(generator, law.noise.freedom, draws)
    losses = law.predict(law.x) + noise[:, None] * generator.standard_normal((draws, len(law.x)))
    return Bootstrap(fit_rows(law.x, losses))


def noise_scale(
    generator: np.random.Generator, freedom: float, draws: int | tuple[int, ...]
) -> Array:
    """Factors, in the shape `draws`, on a deviation as uncertain as its freedom makes it."""
    if not math.isfinite(freedom):
        return np.ones(draws)
    return np.sqrt(freedom / generator.chisquare(freedom, draws))


def percentiles(values: Array, level: float = LEVEL) -> Interval:
    """The central interval of draws (F,)."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def _value(law: PowerLaw, quantity: Quantity, at: float) -> float:
    if quantity is Quantity.LOSS:
        return float(law.predict(np.array(at)))
    return float(getattr(law, quantity.value))


def _bounds(law: PowerLaw, quantity: Quantity) -> tuple[float, float]:
    if quantity is Quantity.B:
        return SMALLEST_EXPONENT, LARGEST_EXPONENT
    return 0.0, min(law.points.losses) if quantity is Quantity.C else math.inf


def _edge(is_inside: Callable[[Array], Mask], start: float, step: float, bound: float) -> float:
    """Where `is_inside` ends between `start` and `bound`: doubling steps, then finer ones.

    Many values are asked for at once, which costs hardly more than one.
    """
    limit = np.minimum if step > 0 else np.maximum
    values = limit(start + step * np.exp2(np.arange(_WIDENINGS)), bound)
    for _ in range(1 + _REFINEMENTS):
        outside = ~is_inside(values)
        if not outside.any():
            return float(values[-1]) if math.isfinite(bound) else math.copysign(math.inf, step)
        first = int(outside.argmax())
        inner = start if first == 0 else float(values[first - 1])
        start, values = inner, np.linspace(inner, values[first], _SECTIONS + 1)[1:]
    return start
