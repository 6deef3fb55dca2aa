"""Two architectures on the same sizes: what their laws differ by, and whether the data can tell.

Differences are first minus second, so a negative loss difference means that the first is better.
Runs of the same size and seed share data, order and validation text, and with them part of their
noise. Where both tables hold the same runs, the bootstrap therefore draws their noise together,
with the covariance of the residuals; otherwise independently.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from sambay.scaling.fit import NoiseSource, PowerLaw, student_quantile
from sambay.scaling.fit_intervals import DRAWS, LEVEL, Interval, noise_scale, percentiles
from sambay.scaling.fit_points import CONSTANTS
from sambay.scaling.fit_solver import Array, Fits, fit_rows

ABOVE = 1000.0  # how far beyond the largest run a crossing is looked for
_GRID_POINTS = 401
_BISECTIONS = 60


@dataclasses.dataclass(frozen=True)
class Difference:
    """An estimate with its interval."""

    estimate: float
    interval: Interval

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero."""
        return 0.0 not in self.interval


@dataclasses.dataclass(frozen=True)
class Crossings:
    """Where the two fitted curves meet, and where they cannot be told apart.

    `points` are the D of the fitted curves. `regions` are the parts of the searched range, from
    `low` to `high`, in which the interval of the difference at that D includes zero; a region that
    reaches the end of the range is open there. They are the 95 % set for the crossing.
    """

    low: float
    high: float
    points: tuple[float, ...]
    regions: tuple[Interval, ...]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two laws compared; `losses` holds the difference of the predicted losses by D.

    `measured` is the mean difference of the measured losses over the sizes that both have, without
    any curve, with Student's interval over the sizes; None if fewer than two are shared.
    """

    first: PowerLaw
    second: PowerLaw
    is_paired: bool
    C: Difference
    b: Difference
    losses: dict[float, Difference]
    measured: Difference | None
    measured_by_size: tuple[tuple[float, float], ...]
    crossings: Crossings
    first_fits: Fits
    second_fits: Fits
    level: float

    def band(self, x: Array) -> tuple[Array, Array, Array]:
        """The difference of the curves at the points x and its ends, (M,) each."""
        low, high = _ends(self.first_fits.predict(x) - self.second_fits.predict(x), self.level)
        return self.first.predict(x) - self.second.predict(x), low, high


def compare(
    first: PowerLaw,
    second: PowerLaw,
    at: Sequence[float],
    *,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = LEVEL,
) -> Comparison:
    """Differences of C, b and the loss at each D in `at`, the crossings, and their intervals."""
    shared = _shared_noise(first, second)
    first_fits, second_fits = _draw(first, second, shared, draws, seed)
    x = np.array(list(at), dtype=float)
    gaps = first_fits.predict(x) - second_fits.predict(x)
    estimates = first.predict(x) - second.predict(x)
    by_size = _measured(first, second)
    return Comparison(
        first=first,
        second=second,
        is_paired=shared is not None,
        C=Difference(first.C - second.C, percentiles(first_fits.C - second_fits.C, level)),
        b=Difference(first.b - second.b, percentiles(first_fits.b - second_fits.b, level)),
        losses={
            float(D): Difference(float(estimate), percentiles(gap, level))
            for D, estimate, gap in zip(x, estimates, gaps.T, strict=True)
        },
        measured=_mean_difference([gap for _, gap in by_size], level),
        measured_by_size=by_size,
        crossings=_crossings(first, second, first_fits, second_fits, level),
        first_fits=first_fits,
        second_fits=second_fits,
        level=level,
    )


def verdict(comparison: Comparison) -> list[str]:
    """What the data say about the two, one plain sentence per question."""
    first, second = comparison.first.name, comparison.second.name
    percent = f"{100 * comparison.level:g} %"
    lines = []
    if comparison.measured is not None:
        lines.append(
            f"Measured, over {len(comparison.measured_by_size)} sizes: "
            + _sentence(comparison.measured, "loss", first, second, percent)
        )
    largest = max(comparison.first.x.max(), comparison.second.x.max())
    for D, difference in comparison.losses.items():
        where = f"D = {D:.3g}" + (f", {D / largest:.3g}x the largest run" if largest < D else "")
        lines.append(f"At {where}: " + _sentence(difference, "loss", first, second, percent))
    lines.append("As D grows without end (C): "
                 + _sentence(comparison.C, "C", first, second, percent))  # fmt: skip
    lines.append("Exponent (b): " + _exponent(comparison.b, first, second, percent))
    lines.append(_crossing_sentence(comparison, percent))
    return lines


def _sentence(difference: Difference, what: str, first: str, second: str, percent: str) -> str:
    ends = f"{difference.interval.low:+.4f} to {difference.interval.high:+.4f}"
    numbers = f"{first} minus {second} is {difference.estimate:+.4f} ({percent} {ends})"
    if not difference.is_clear:
        return f"{numbers}: the data cannot tell them apart."
    better = first if difference.estimate < 0 else second
    return f"{numbers}: {better} has the lower {what}."


def _exponent(difference: Difference, first: str, second: str, percent: str) -> str:
    ends = f"{difference.interval.low:+.4f} to {difference.interval.high:+.4f}"
    numbers = f"{first} minus {second} is {difference.estimate:+.4f} ({percent} {ends})"
    if not difference.is_clear:
        return f"{numbers}: the data cannot tell them apart."
    return f"{numbers}: {first if difference.estimate > 0 else second} approaches its C faster."


def _crossing_sentence(comparison: Comparison, percent: str) -> str:
    crossings = comparison.crossings
    searched = f"{crossings.low:.2g} to {crossings.high:.2g}"
    where = " and ".join(f"D = {point:.3g}" for point in crossings.points)
    found = f"The fitted curves cross at {where}" if where else "The fitted curves do not cross"
    if not crossings.regions:
        return f"{found} between {searched}, and no crossing there is compatible with the data."
    parts = " and ".join(_region(region, crossings) for region in crossings.regions)
    return f"{found} (searched from {searched}); the {percent} set for a crossing is {parts}."


def _region(region: Interval, crossings: Crossings) -> str:
    is_open_below = region.low <= crossings.low * (1 + 1e-9)
    is_open_above = region.high >= crossings.high * (1 - 1e-9)
    if is_open_below and is_open_above:
        return "all of it: the data say nothing about where they cross"
    if is_open_below:
        return f"everything up to {region.high:.3g}"
    if is_open_above:
        return f"everything above {region.low:.3g}, without an upper end"
    return f"{region.low:.3g} to {region.high:.3g}"


def _shared_noise(first: PowerLaw, second: PowerLaw) -> tuple[Array, int] | None:
    """The (2, 2) covariance of the noise of runs that belong together and its degrees of freedom.

    None if the tables do not hold the same runs.

    Only noise that was itself taken from the residuals has a counterpart between architectures.
    """
    if set(first.points.keys) != set(second.points.keys):
        return None
    sources = {first.noise.source, second.noise.source}
    if sources == {NoiseSource.RESIDUALS}:
        freedom = len(first.x) - CONSTANTS
        mine, other = first.residuals, second.residuals
    elif sources <= {NoiseSource.RESIDUALS, NoiseSource.LACK_OF_FIT}:
        freedom = len(first.points.sizes) - CONSTANTS
        mine, other = first.lack_of_fit_residuals(), second.lack_of_fit_residuals()
    else:
        return None
    order = [second.points.keys.index(key) for key in first.points.keys]
    residuals = np.stack([mine, other[order]])
    return residuals @ residuals.T / freedom, freedom


def _draw(
    first: PowerLaw, second: PowerLaw, shared: tuple[Array, int] | None, draws: int, seed: int
) -> tuple[Fits, Fits]:
    generator = np.random.default_rng(seed)
    if shared is None:
        tables = []
        for law in (first, second):
            sigma = law.noise.sigma * noise_scale(generator, law.noise.freedom, draws)
            noise = generator.standard_normal((draws, len(law.x)))
            tables.append(law.predict(law.x) + sigma[:, None] * noise)
        return fit_rows(first.x, tables[0]), fit_rows(second.x, tables[1])
    # One factor for both: any difference then follows Student's distribution, as its own residuals
    # would give it.
    covariance, freedom = shared
    scale = noise_scale(generator, freedom, draws)[:, None, None]
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    noise = scale * (generator.standard_normal((draws, len(first.x), 2)) @ root.T)
    order = [first.points.keys.index(key) for key in second.points.keys]
    return (
        fit_rows(first.x, first.predict(first.x) + noise[:, :, 0]),
        fit_rows(second.x, second.predict(second.x) + noise[:, order, 1]),
    )


def _measured(first: PowerLaw, second: PowerLaw) -> tuple[tuple[float, float], ...]:
    """(D of the first, difference of the mean losses) of every size that both have."""

    def by_size(law: PowerLaw) -> dict[object, list[tuple[float, float]]]:
        found: dict[object, list[tuple[float, float]]] = {}
        rows = zip(law.points.keys, law.points.x, law.points.losses, strict=True)
        for (size, _), x, loss in rows:
            found.setdefault(size, []).append((x, loss))
        return found

    mine, other = by_size(first), by_size(second)
    gaps = [
        (mine[size][0][0], _mean([loss for _, loss in mine[size]])
         - _mean([loss for _, loss in other[size]]))
        for size in mine if size in other
    ]  # fmt: skip
    return tuple(sorted(gaps))


def _mean_difference(gaps: Sequence[float], level: float) -> Difference | None:
    if len(gaps) < 2:
        return None
    mean, count = _mean(gaps), len(gaps)
    error = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / (count - 1) / count)
    half = student_quantile(level, count - 1) * error
    return Difference(mean, Interval(mean - half, mean + half))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _crossings(
    first: PowerLaw, second: PowerLaw, first_fits: Fits, second_fits: Fits, level: float
) -> Crossings:
    everything = np.concatenate([first.x, second.x])
    x = np.geomspace(everything.min(), everything.max() * ABOVE, _GRID_POINTS)
    gap = first.predict(x) - second.predict(x)
    changes = np.flatnonzero(np.sign(gap[1:]) != np.sign(gap[:-1]))
    points = tuple(_root(first, second, float(x[i]), float(x[i + 1])) for i in changes)
    low, high = _ends(first_fits.predict(x) - second_fits.predict(x), level)
    return Crossings(float(x[0]), float(x[-1]), points, _regions(x, low, high))


def _root(first: PowerLaw, second: PowerLaw, low: float, high: float) -> float:
    def gap(D: float) -> float:
        return float(first.predict(np.array(D)) - second.predict(np.array(D)))

    is_positive_below = gap(low) > 0
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high)
        if (gap(middle) > 0) == is_positive_below:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


def _regions(x: Array, low: Array, high: Array) -> tuple[Interval, ...]:
    """The parts of x where low <= 0 <= high, both taken as straight between points of log x."""
    log_x = np.log(x)
    borders = {float(log_x[0]), float(log_x[-1])}
    for end in (low, high):
        for i in np.flatnonzero((end[1:] > 0) != (end[:-1] > 0)):
            share = end[i] / (end[i] - end[i + 1])
            borders.add(float(log_x[i] + share * (log_x[i + 1] - log_x[i])))
    found: list[Interval] = []
    edges = sorted(borders)
    for left, right in itertools.pairwise(edges):
        middle = (left + right) / 2
        if np.interp(middle, log_x, low) <= 0 <= np.interp(middle, log_x, high):
            if found and found[-1].high == math.exp(left):
                left = math.log(found.pop().low)
            found.append(Interval(math.exp(left), math.exp(right)))
    return tuple(found)


def _ends(values_FM: Array, level: float) -> tuple[Array, Array]:
    low, high = np.quantile(values_FM, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high
