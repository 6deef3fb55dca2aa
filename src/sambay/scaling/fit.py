"""The law L = A D^-b + C of one architecture by least squares, with its noise (scipy).

    law = fit_power_law(Points.of("sambay", flops, losses))
    law.C, law.errors["C"], profile_interval(law, Quantity.C)

Source: arXiv 2507.06607, section 3.2: non-linear least squares on the final losses of five models.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Any

import numpy as np

from sambay.errors import DataError, MissingPackage
from sambay.scaling.fit_points import CONSTANTS, Points
from sambay.scaling.fit_solver import LARGEST_EXPONENT, SMALLEST_EXPONENT, Array

_STARTS = (0.03, 0.1, 0.3, 1.0)
_AT_BOUND = 1e-5  # relative; the solver comes close to a bound but never onto it
_DOUBTFUL = 0.05  # below this probability seeds and curve disagree about the noise


class NoiseSource(enum.Enum):
    """Where the noise of the losses is known from."""

    RESIDUALS = "residuals"  # distance of all runs from the curve
    LACK_OF_FIT = "lack of fit"  # distance of the sizes' means from the curve
    SEEDS = "seeds"  # runs of one size against each other
    GIVEN = "given"


@dataclasses.dataclass(frozen=True)
class Noise:
    """Standard deviation of one run's loss in nats, and the degrees of freedom it rests on.

    The freedom is infinite if the deviation is known rather than estimated.
    """

    sigma: float
    freedom: float
    source: NoiseSource


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """A fitted law: constants, standard errors from the Jacobian, residuals, noise.

    `seed_noise` is there if sizes were run more than once; `adequacy` is then the probability of
    runs at least this far from the best curve if the curve were true. `at_bound` names constants
    that the bounds hold, whose standard errors mean little.
    """

    points: Points
    A: float
    b: float
    C: float
    errors: dict[str, float]
    r_squared: float
    residuals: Array
    noise: Noise
    seed_noise: Noise | None
    adequacy: float | None
    at_bound: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.points.name

    @property
    def x(self) -> Array:
        """D of every run, (N,)."""
        return np.array(self.points.x)

    def predict(self, x: Array) -> Array:
        """The losses at the points x, in x's shape."""
        return self.A * np.exp(-self.b * np.log(x)) + self.C

    def with_noise(self, noise: Noise) -> PowerLaw:
        """The same curve with another belief about the noise; standard errors follow it."""
        if self.noise.sigma > 0:
            ratio = noise.sigma / self.noise.sigma
            errors = {name: value * ratio for name, value in self.errors.items()}
            return dataclasses.replace(self, noise=noise, errors=errors)
        errors = _standard_errors(self.x, (self.A, self.b, self.C), noise.sigma)
        return dataclasses.replace(self, noise=noise, errors=errors)

    def lack_of_fit_residuals(self) -> Array:
        """Residuals of the sizes' means, each run taking its size's, (N,)."""
        means = {D: self.residuals[self.x == D].mean() for D in self.points.sizes}
        return np.array([means[D] for D in self.x])


def fit_power_law(points: Points) -> PowerLaw:
    """The least-squares law: 0 < A, 1e-6 < b < 2, 0 < C < the least loss, from several starts.

    Every run counts once, so a size with two seeds weighs twice. The noise comes from the
    distances of all runs from the curve, with three degrees of freedom taken by the constants;
    where seeds show that the curve itself misses the sizes' means by more than chance, it comes
    from these means instead.

    Raises:
        DataError: points that no curve can be fitted to (see `Points.check`).
        MissingPackage: scipy is not installed.
    """
    points.check()
    x, losses = np.array(points.x), np.array(points.losses)
    A, b, C = _least_squares(x, losses)
    residuals = losses - (A * np.exp(-b * np.log(x)) + C)
    rss = float(residuals @ residuals)
    total = float(((losses - losses.mean()) ** 2).sum())
    seed_noise, adequacy = _seeds_against_curve(points, residuals)
    noise = Noise(math.sqrt(rss / (len(x) - CONSTANTS)), len(x) - CONSTANTS, NoiseSource.RESIDUALS)
    if adequacy is not None and adequacy < _DOUBTFUL:
        noise = lack_of_fit_noise(points, residuals)
    least = float(losses.min())
    held = {
        "C": not least * _AT_BOUND < C < least * (1 - _AT_BOUND),
        "b": not SMALLEST_EXPONENT * 1.1 < b < LARGEST_EXPONENT * (1 - _AT_BOUND),
    }
    return PowerLaw(
        points=points,
        A=A,
        b=b,
        C=C,
        errors=_standard_errors(x, (A, b, C), noise.sigma),
        r_squared=1 - rss / total,
        residuals=residuals,
        noise=noise,
        seed_noise=seed_noise,
        adequacy=adequacy,
        at_bound=tuple(name for name, is_held in held.items() if is_held),
    )


def lack_of_fit_noise(points: Points, residuals: Array) -> Noise:
    """The noise of one run that would explain the distances of the sizes' means from the curve."""
    x = np.array(points.x)
    square = sum(
        (x == D).sum() * residuals[x == D].mean() ** 2 for D in points.sizes
    )  # a mean of r runs has 1/r of the variance
    freedom = len(points.sizes) - CONSTANTS
    return Noise(math.sqrt(float(square) / freedom), freedom, NoiseSource.LACK_OF_FIT)


def pooled_noise(laws: list[PowerLaw]) -> Noise:
    """One deviation for all architectures, which gives the interval of each more freedom."""
    freedom = sum(law.noise.freedom for law in laws)
    square = sum(law.noise.sigma**2 * law.noise.freedom for law in laws) / freedom
    return Noise(math.sqrt(square), freedom, NoiseSource.GIVEN)


def student_quantile(level: float, freedom: float) -> float:
    """The half width, in standard errors, of a two-sided interval at this level."""
    stats = _scipy().stats
    return float(stats.t.ppf((1 + level) / 2, freedom)) if math.isfinite(freedom) else float(
        stats.norm.ppf((1 + level) / 2)
    )  # fmt: skip


def _seeds_against_curve(points: Points, residuals: Array) -> tuple[Noise | None, float | None]:
    """The noise between seeds, and the probability of the curve's misfit under that noise."""
    freedom = len(points.x) - len(points.sizes)
    if freedom == 0:
        return None, None
    x = np.array(points.x)
    square = sum(float(residuals[x == D].var() * (x == D).sum()) for D in points.sizes)
    seeds = Noise(math.sqrt(square / freedom), freedom, NoiseSource.SEEDS)
    if seeds.sigma == 0:
        raise DataError(f"{points.name}: runs of different seeds have exactly equal losses; "
                        "check that each row is a run of its own")  # fmt: skip
    misfit = lack_of_fit_noise(points, residuals)
    ratio = (misfit.sigma / seeds.sigma) ** 2
    return seeds, float(_scipy().stats.f.sf(ratio, misfit.freedom, freedom))


def _least_squares(x: Array, losses: Array) -> tuple[float, float, float]:
    """A, b, C: the best end of several bounded searches."""
    optimize = _scipy().optimize
    centre = float(np.log(x).mean())
    log_x = np.log(x) - centre  # A is then of the size of the losses, whatever the unit of D
    least = float(losses.min())

    def distance(constants: Array) -> Array:
        return constants[0] * np.exp(-constants[1] * log_x) + constants[2] - losses

    def slopes(constants: Array) -> Array:
        power = np.exp(-constants[1] * log_x)
        return np.stack([power, -constants[0] * log_x * power, np.ones_like(power)], axis=1)

    ends = []
    for exponent in _STARTS:
        power = np.exp(-exponent * log_x)
        slope, level = np.polyfit(power, losses, 1)
        start = (
            max(float(slope), 1e-3 * least),
            exponent,
            float(np.clip(level, 0.01, 0.99 * least)),
        )
        ends.append(
            optimize.least_squares(
                distance, start, slopes, method="trf", x_scale="jac", max_nfev=4000,
                bounds=([0.0, SMALLEST_EXPONENT, 0.0], [np.inf, LARGEST_EXPONENT, least]),
                ftol=1e-15, xtol=1e-15, gtol=1e-15,
            )
        )  # fmt: skip
    scale, b, C = min(ends, key=lambda end: end.cost).x
    return float(scale * math.exp(b * centre)), float(b), float(C)


def _standard_errors(
    x: Array, constants: tuple[float, float, float], sigma: float
) -> dict[str, float]:
    """Roots of the diagonal of sigma^2 (J'J)^-1, with J in D's geometric mean for its condition."""
    A, b, _ = constants
    centre = float(np.log(x).mean())
    log_x = np.log(x) - centre
    scale = A * math.exp(-b * centre)
    power = np.exp(-b * log_x)
    jacobian = np.stack([power, -scale * log_x * power, np.ones_like(power)], axis=1)
    covariance = sigma**2 * np.linalg.pinv(jacobian.T @ jacobian, hermitian=True)
    # A = scale exp(b centre), so its error mixes those of both.
    by_scale = np.array([math.exp(b * centre), A * centre, 0.0])
    variances = {
        "A": by_scale @ covariance @ by_scale,
        "b": covariance[1, 1],
        "C": covariance[2, 2],
    }
    return {name: math.sqrt(max(float(value), 0.0)) for name, value in variances.items()}


def _scipy() -> Any:
    try:
        import scipy.optimize
        import scipy.stats
    except ImportError as error:
        raise MissingPackage("scipy", "fitting scaling laws", "scaling") from error
    return scipy
