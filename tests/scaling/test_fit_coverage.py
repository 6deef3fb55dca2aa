"""Simulated tables with planted constants: the stated 95 % intervals hold them in 90 to 99 %."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from sambay.scaling.compare import compare
from sambay.scaling.fit import (
    Noise,
    NoiseSource,
    PowerLaw,
    _standard_errors,
    fit_power_law,
    student_quantile,
)
from sambay.scaling.fit_intervals import noise_scale
from sambay.scaling.fit_points import Points
from sambay.scaling.fit_solver import Fits, Fixed, Quantity, fit_rows

FIVE = np.array([9.1e18, 1.04e20, 5.8e20, 2.2e21, 6.7e21])
SIX = np.arange(1.0, 7.0) * 100
SMALL = np.geomspace(1e13, 1e16, 5)
# D of the runs, constants, deviation of a run
DESIGNS = {
    "five": (FIVE, (40.0, 0.07, 0.6), 0.001),
    "five noisy": (FIVE, (40.0, 0.07, 0.6), 0.005),
    "five, two seeds": (np.repeat(FIVE, 2), (40.0, 0.07, 0.6), 0.002),
    "five small models": (SMALL, (120.0, 0.13, 1.5), 0.004),
    "two seeds at the smallest": (np.sort([*SMALL, *SMALL[:2]]), (120.0, 0.13, 1.5), 0.004),
    "six": (SIX, (1.2, 0.4, 1.82), 0.001),
}
QUANTITIES = (Quantity.B, Quantity.C, Quantity.LOSS)


def truths(design: str) -> tuple[np.ndarray, dict[Quantity, float], float]:
    """D of the runs, the planted values, and the D of the predicted loss, beyond the largest."""
    x, (A, b, C), _ = DESIGNS[design]
    at = 10 * float(x.max())
    return x, {Quantity.B: b, Quantity.C: C, Quantity.LOSS: A * at**-b + C}, at


def tables(design: str, trials: int) -> np.ndarray:
    x, (A, b, C), sigma = DESIGNS[design]
    noise = np.random.default_rng(11).standard_normal((trials, len(x)))
    return A * x**-b + C + sigma * noise


@pytest.mark.parametrize("design", DESIGNS)
def test_profile_intervals_cover(design: str) -> None:
    """The interval holds the truth where the profile there is below the threshold."""
    x, values, at = truths(design)
    losses = tables(design, trials=600)
    fits = fit_rows(x, losses)
    freedom = len(x) - 3
    allowed = student_quantile(0.95, freedom) ** 2 * fits.rss / freedom
    for quantity, value in values.items():
        held = fit_rows(x, losses, Fixed(quantity, np.full(600, value), at))
        covered = float((held.rss - fits.rss <= allowed).mean())
        assert 0.92 < covered < 0.98, (quantity, covered)


def bootstrap_coverage(design: str, trials: int, draws: int) -> dict[Quantity, float]:
    x, values, at = truths(design)
    fits = fit_rows(x, tables(design, trials))
    freedom = len(x) - 3
    generator = np.random.default_rng(12)
    sigma = np.sqrt(fits.rss / freedom)[:, None] * noise_scale(generator, freedom, (trials, draws))
    noise = sigma[:, :, None] * generator.standard_normal((trials, draws, len(x)))
    losses = fits.predict(x)[:, None] + noise
    drawn = fit_rows(x, losses.reshape(trials * draws, len(x)))
    found = {Quantity.B: drawn.b, Quantity.C: drawn.C, Quantity.LOSS: loss_at(drawn, at)}
    covered = {}
    for quantity, value in values.items():
        ends = np.quantile(found[quantity].reshape(trials, draws), [0.025, 0.975], axis=1)
        covered[quantity] = float(((ends[0] <= value) & (value <= ends[1])).mean())
    return covered


def loss_at(fits: Fits, at: float) -> np.ndarray:
    return fits.predict(np.array([at]))[:, 0]


def test_bootstrap_intervals_cover_five_points() -> None:
    for quantity, covered in bootstrap_coverage("five", trials=200, draws=120).items():
        assert 0.90 <= covered <= 0.99, (quantity, covered)


@pytest.mark.slow
@pytest.mark.parametrize("design", DESIGNS)
def test_bootstrap_intervals_cover(design: str) -> None:
    for quantity, covered in bootstrap_coverage(design, trials=300, draws=300).items():
        assert 0.91 < covered < 0.985, (quantity, covered)


def test_two_standard_errors_would_cover_too_little() -> None:
    """Why the intervals above are not +- 1.96 standard errors."""
    x, values, _ = truths("five")
    fits = fit_rows(x, tables("five", trials=300))
    held = [
        abs(C - values[Quantity.C]) <= 1.96 * _standard_errors(x, (A, b, C), sigma)["C"]
        for A, b, C, sigma in zip(fits.A, fits.b, fits.C, np.sqrt(fits.rss / 2), strict=True)
    ]
    assert np.mean(held) < 0.88


def refitted(law: PowerLaw, losses: np.ndarray) -> PowerLaw:
    """The law of other losses at the same D, by the fast solver."""
    fits = fit_rows(law.x, losses[None])
    freedom = len(losses) - 3
    noise = Noise(math.sqrt(fits.rss[0] / freedom), freedom, NoiseSource.RESIDUALS)
    return dataclasses.replace(
        law, A=float(fits.A[0]), b=float(fits.b[0]), C=float(fits.C[0]), noise=noise,
        points=dataclasses.replace(law.points, losses=tuple(losses.tolist())),
        residuals=losses - fits.predict(law.x)[0],
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("shared", "seeds"), [(0.0, 1), (0.8, 1), (0.8, 2)])
def test_intervals_of_differences_cover(shared: float, seeds: int) -> None:
    """Noise that two architectures share, as from the same data, or do not."""
    trials, x = 200, np.repeat(FIVE, seeds)
    first, second = (40.57, 0.0702, 0.607), (39.79, 0.0694, 0.585)
    at = [float(FIVE[2]), 10 * float(FIVE[-1])]
    generator = np.random.default_rng(5)
    labels = list(range(seeds)) * len(FIVE)
    ripple = 1e-4 * np.cos(np.arange(len(x)))
    templates = {
        name: fit_power_law(Points.of(name, x, A * x**-b + C + ripple, labels))
        for name, (A, b, C) in (("first", first), ("second", second))
    }
    held = []
    for trial in range(trials):
        common = math.sqrt(shared) * generator.standard_normal(len(x))
        laws = []
        for name, (A, b, C) in (("first", first), ("second", second)):
            own = math.sqrt(1 - shared) * generator.standard_normal(len(x))
            losses = A * x**-b + C + 0.001 * (common + own)
            laws.append(refitted(templates[name], losses))
        made = compare(laws[0], laws[1], at, draws=200, seed=trial)
        true = [first[0] * D ** -first[1] + first[2] - second[0] * D ** -second[1] - second[2]
                for D in at]  # fmt: skip
        held.append(
            [
                first[2] - second[2] in made.C.interval,
                first[1] - second[1] in made.b.interval,
                *(gap in made.losses[D].interval for gap, D in zip(true, at, strict=True)),
            ]
        )
    assert made.is_paired
    covered = np.mean(held, axis=0)
    assert covered.min() >= 0.90, covered
    assert covered.max() <= 0.99, covered
