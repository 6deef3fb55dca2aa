"""Planted constants come back, slow and fast solver agree, intervals hold what they should."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sambay.errors import DataError
from sambay.scaling.fit import NoiseSource, fit_power_law, pooled_noise, student_quantile
from sambay.scaling.fit_intervals import bootstrap, profile_interval
from sambay.scaling.fit_points import Points
from sambay.scaling.fit_solver import Fixed, Quantity, fit_rows

FLOPS = np.array([9.1e18, 1.04e20, 5.8e20, 2.2e21, 6.7e21])
TOKENS = np.arange(1.0, 7.0) * 100


def planted(x: np.ndarray, A: float, b: float, C: float, sigma: float, seed: int) -> np.ndarray:
    noise = sigma * np.random.default_rng(seed).standard_normal(len(x))
    return A * x**-b + C + noise


@pytest.mark.parametrize(
    ("x", "A", "b", "C"),
    [
        (FLOPS, 40.0, 0.07, 0.6),
        (TOKENS, 1.2, 0.4, 1.82),
        (TOKENS * 1e9, 5e3, 0.4, 1.82),
        (np.array([1.0, 3, 10, 30]), 2.0, 1.5, 0.1),
        (np.array([1e14, 1e15, 1e16, 1e17]), 900.0, 0.17, 3.0),
    ],
)
def test_planted_constants_come_back_exactly_without_noise(
    x: np.ndarray, A: float, b: float, C: float
) -> None:
    law = fit_power_law(Points.of("planted", x, planted(x, A, b, C, 0.0, 0)))
    assert (law.A, law.b, law.C) == pytest.approx((A, b, C), rel=1e-5)
    assert law.r_squared == pytest.approx(1.0, abs=1e-12)
    assert law.at_bound == ()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("sigma", [1e-4, 3e-3, 2e-2])
def test_scipy_and_the_fast_solver_find_the_same_minimum(seed: int, sigma: float) -> None:
    for x, constants in ((FLOPS, (40.0, 0.07, 0.6)), (np.repeat(TOKENS, 2), (1.2, 0.4, 1.82))):
        losses = planted(x, *constants, sigma, seed)
        seeds = [0] * len(x) if len(set(x)) == len(x) else [0, 1] * (len(x) // 2)
        law = fit_power_law(Points.of("noisy", x, losses, seeds))
        fast = fit_rows(x, losses[None])
        slow_rss = float(law.residuals @ law.residuals)
        assert fast.rss[0] == pytest.approx(slow_rss, rel=1e-6)
        if not law.at_bound:
            assert fast.C[0] == pytest.approx(law.C, abs=1e-3)
        assert fast.predict(x)[0] == pytest.approx(law.predict(x), abs=1e-5)


@pytest.mark.parametrize("quantity", list(Quantity))
def test_a_profile_is_the_best_fit_through_a_value(quantity: Quantity) -> None:
    """Against a search over the remaining two constants on a fine grid."""
    losses = planted(TOKENS, 1.2, 0.4, 1.82, 1e-3, 1)
    law = fit_power_law(Points.of("a", TOKENS, losses))
    at = 1200.0
    estimate = {"A": law.A, "b": law.b, "C": law.C, "loss": float(law.predict(np.array(at)))}
    value = estimate[quantity.value] * (1.05 if quantity is not Quantity.LOSS else 1.002)
    found = fit_rows(TOKENS, losses[None], Fixed(quantity, np.array([value]), at))
    held = {"A": found.A[0], "b": found.b[0], "C": found.C[0], "loss": found.predict([at])[0, 0]}
    assert held[quantity.value] == pytest.approx(value, rel=1e-9)
    b = np.linspace(0.05, 1.6, 801)[:, None, None]
    C = np.linspace(1.7, 1.9, 401)[None, :, None]
    if quantity is Quantity.B:
        b = np.full((1, 1, 1), value)
    if quantity is Quantity.C:
        C = np.full((1, 1, 1), value)
    power = TOKENS**-b
    if quantity is Quantity.A:
        A = value
    elif quantity is Quantity.LOSS:
        A = (value - C) * at**b
    else:
        A = (power * (losses - C)).sum(-1, keepdims=True) / (power**2).sum(-1, keepdims=True)
    rss = ((A * power + C - losses) ** 2).sum(-1).min()
    assert found.rss[0] <= rss * (1 + 1e-9)
    assert found.rss[0] == pytest.approx(rss, rel=0.1)


def test_profile_interval_ends_where_the_f_distribution_says() -> None:
    losses = planted(TOKENS, 1.2, 0.4, 1.82, 1e-3, 3)
    law = fit_power_law(Points.of("a", TOKENS, losses))
    allowed = student_quantile(0.95, 3) ** 2
    assert allowed == pytest.approx(10.128, abs=1e-3)  # F(1, 3) at 95 %
    for quantity in (Quantity.A, Quantity.B, Quantity.C):
        interval = profile_interval(law, quantity)
        for end in (interval.low, interval.high):
            held = fit_rows(TOKENS, losses[None], Fixed(quantity, np.array([end])))
            least = float(law.residuals @ law.residuals)
            assert (held.rss[0] - least) / law.noise.sigma**2 == pytest.approx(allowed, rel=1e-3)


def test_intervals_agree_with_students_where_the_model_is_nearly_straight() -> None:
    losses = planted(TOKENS, 1.2, 0.4, 1.82, 1e-5, 0)
    law = fit_power_law(Points.of("a", TOKENS, losses))
    half = student_quantile(0.95, 3) * law.errors["C"]
    drawn = bootstrap(law, draws=4000).interval(Quantity.C)
    exact = profile_interval(law, Quantity.C)
    for interval, tolerance in ((exact, 0.02), (drawn, 0.12)):
        assert interval.low == pytest.approx(law.C - half, abs=tolerance * half)
        assert interval.high == pytest.approx(law.C + half, abs=tolerance * half)


def test_c_interval_reaches_zero_where_the_data_cannot_exclude_a_pure_power_law() -> None:
    law = fit_power_law(Points.of("a", FLOPS, planted(FLOPS, 40.0, 0.07, 0.6, 0.02, 4)))
    assert profile_interval(law, Quantity.C).low == 0.0
    assert bootstrap(law, draws=500).interval(Quantity.C).low == pytest.approx(0.0, abs=1e-6)


def test_the_same_seed_draws_the_same_tables() -> None:
    law = fit_power_law(Points.of("a", TOKENS, planted(TOKENS, 1.2, 0.4, 1.82, 1e-3, 3)))
    first, again, other = (bootstrap(law, draws=200, seed=seed) for seed in (5, 5, 6))
    assert np.array_equal(first.fits.C, again.fits.C)
    assert not np.array_equal(first.fits.C, other.fits.C)


def test_seeds_show_a_curve_that_misses_the_sizes() -> None:
    """Seeds that agree to 1e-5 around means 1e-2 off the curve: the means give the noise."""
    x = np.repeat(TOKENS, 2)
    misfit = np.repeat([0.01, -0.01, 0.01, -0.01, 0.01, -0.01], 2)
    losses = planted(x, 1.2, 0.4, 1.82, 1e-5, 0) + misfit
    law = fit_power_law(Points.of("a", x, losses, [0, 1] * 6))
    assert law.noise.source is NoiseSource.LACK_OF_FIT
    assert law.noise.freedom == 3
    assert law.adequacy is not None
    assert law.adequacy < 1e-6
    means = fit_power_law(Points.of("means", TOKENS, losses.reshape(6, 2).mean(axis=1)))
    assert law.errors["C"] == pytest.approx(means.errors["C"], rel=1e-3)


def test_seeds_that_agree_with_the_curve_add_freedom() -> None:
    x = np.repeat(TOKENS, 2)
    law = fit_power_law(Points.of("a", x, planted(x, 1.2, 0.4, 1.82, 1e-3, 2), [0, 1] * 6))
    assert law.noise.source is NoiseSource.RESIDUALS
    assert law.noise.freedom == 9
    assert law.seed_noise is not None
    assert law.seed_noise.freedom == 6
    assert law.seed_noise.sigma == pytest.approx(1e-3, rel=0.6)


def test_pooled_noise_and_another_noise_scale_the_errors() -> None:
    laws = [
        fit_power_law(Points.of(str(seed), TOKENS, planted(TOKENS, 1.2, 0.4, 1.82, 1e-3, seed)))
        for seed in range(4)
    ]
    noise = pooled_noise(laws)
    assert noise.freedom == 12
    assert noise.sigma == pytest.approx(
        math.sqrt(sum(float(law.residuals @ law.residuals) for law in laws) / 12)
    )
    again = laws[0].with_noise(noise)
    ratio = noise.sigma / laws[0].noise.sigma
    assert again.errors["C"] == pytest.approx(laws[0].errors["C"] * ratio)
    assert again.C == laws[0].C


@pytest.mark.parametrize(
    ("x", "losses", "seeds", "message"),
    [
        ([1, 2, 3], [3, 2, 1], None, "3 different D.*at least 4; train 1 more size"),
        ([1, 2], [3, 2], None, "train 2 more sizes"),
        ([1, 1, 2, 2, 3, 3], [3, 3.1, 2, 2.1, 1, 1.1], [0, 1] * 3, "train 1 more size"),
        ([1, 2, 3, 4], [3, 2, math.nan, 1], None, "a D=3: its loss is nan; train it again"),
        ([1, 2, 3, 4], [3, 2, math.inf, 1], [7] * 4, "a D=3 seed 7: its loss is inf"),
        ([0, 2, 3, 4], [4, 3, 2, 1], None, "a D=0: D is 0; a power law needs D > 0"),
        ([-1, 2, 3, 4], [4, 3, 2, 1], None, "D is -1"),
        ([1, 2, 3, 4, 4], [4, 3, 2, 1, 1.1], None, "2 runs of D=4 without seeds; give each"),
        ([1, 2, 3, 4, 4], [4, 3, 2, 1, 1.1], [0] * 5, "2 runs of D=4 with seed 0"),
        ([1, 2, 3, 4], [1, 2, 3, 4], None, "do not fall as D grows"),
        ([1, 2, 3, 4], [2, 2, 2, 2], None, "do not fall as D grows"),
        ([1, 2, 3], [1, 2, 3, 4], None, "3 values of D, but 4 losses"),
    ],
)
def test_points_that_cannot_be_fitted_are_refused_in_words(
    x: list[float], losses: list[float], seeds: list[int] | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Points.of("a", x, losses, seeds)


def test_two_seeds_with_one_result_are_refused() -> None:
    x = np.repeat(TOKENS, 2)
    points = Points.of("a", x, planted(x, 1.2, 0.4, 1.82, 0.0, 0), [0, 1] * 6)
    with pytest.raises(DataError, match="exactly equal losses"):
        fit_power_law(points)
