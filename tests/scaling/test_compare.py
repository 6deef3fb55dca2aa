"""Differences of planted laws, their crossing, and verdicts that admit what cannot be known."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from sambay.scaling.compare import Comparison, compare, verdict
from sambay.scaling.fit import Noise, NoiseSource, PowerLaw, fit_power_law
from sambay.scaling.fit_points import Points

X = np.geomspace(1e13, 1e16, 5)
FIRST, SECOND = (120.0, 0.13, 1.5), (90.0, 0.12, 1.45)


def law(
    name: str, constants: tuple[float, float, float], sigma: float, seed: int, shared: float = 0.0
) -> PowerLaw:
    """A law fitted to noisy losses, of which a part is the same for all of one `seed // 10`."""
    A, b, C = constants
    common = np.random.default_rng(seed // 10).standard_normal(len(X))
    own = np.random.default_rng(seed).standard_normal(len(X))
    noise = math.sqrt(shared) * common + math.sqrt(1 - shared) * own
    return fit_power_law(Points.of(name, X, A * X**-b + C + sigma * noise))


def gap_at(x: float) -> float:
    return FIRST[0] * x ** -FIRST[1] + FIRST[2] - SECOND[0] * x ** -SECOND[1] - SECOND[2]


@pytest.fixture(scope="module")
def clear() -> Comparison:
    return compare(
        law("first", FIRST, 1e-5, 11), law("second", SECOND, 1e-5, 12), [1e15, 1e17], draws=600
    )


def test_estimates_are_the_planted_differences(clear: Comparison) -> None:
    assert clear.C.estimate == pytest.approx(FIRST[2] - SECOND[2], abs=5e-3)
    assert clear.b.estimate == pytest.approx(FIRST[1] - SECOND[1], abs=5e-4)
    for x, difference in clear.losses.items():
        assert difference.estimate == pytest.approx(gap_at(x), abs=2e-4)
        assert difference.is_clear
    assert clear.C.is_clear
    assert clear.b.is_clear
    assert dict(clear.measured_by_size)[X[2]] == pytest.approx(gap_at(X[2]), abs=1e-4)


def test_swapping_the_two_changes_the_sign_only(clear: Comparison) -> None:
    swapped = compare(clear.second, clear.first, list(clear.losses), draws=600)
    assert swapped.C.estimate == -clear.C.estimate
    assert swapped.measured is not None
    assert clear.measured is not None
    assert swapped.measured.interval.low == pytest.approx(-clear.measured.interval.high)
    assert swapped.crossings.points == pytest.approx(clear.crossings.points)


def test_crossing_is_where_the_planted_curves_meet() -> None:
    """Planted to cross at 3e15: a lower A makes up for a lower exponent below, not above."""
    meet = 3e15
    A = (FIRST[0] * meet ** -FIRST[1] + FIRST[2] - SECOND[2]) * meet ** SECOND[1]
    made = compare(
        law("first", FIRST, 2e-5, 13), law("second", (A, *SECOND[1:]), 2e-5, 14), [1e15], draws=800
    )
    assert made.crossings.points == pytest.approx((meet,), rel=0.1)
    (region,) = made.crossings.regions
    assert made.crossings.points[0] in region
    assert X[0] < region.low < region.high < 1e17
    assert region.low / 1.1 < meet < region.high * 1.1
    assert verdict(made)[-1].startswith("The fitted curves cross at D = ")
    wide = compare(
        law("first", FIRST, 2e-2, 13), law("second", (A, *SECOND[1:]), 2e-2, 14), [1e15], draws=400
    )
    assert wide.crossings.regions[0].low < region.low
    assert wide.crossings.regions[-1].high > region.high


def test_verdict_says_which_is_better_or_that_it_cannot_be_told(clear: Comparison) -> None:
    said = " ".join(line for line in verdict(clear) if not line.startswith("Measured"))
    assert "second has the lower C." in said
    assert "first approaches its C faster." in said
    assert "cannot tell" not in said
    better = "second" if gap_at(1e17) > 0 else "first"
    assert any("10x the largest run" in line and f"{better} has the lower loss" in line
               for line in verdict(clear))  # fmt: skip
    noisy = compare(
        law("first", FIRST, 0.05, 21), law("second", FIRST, 0.05, 22), [1e15], draws=400
    )
    lines = verdict(noisy)
    assert sum("the data cannot tell them apart" in line for line in lines) == 4
    assert any(word in lines[-1] for word in ("all of it", "everything above", "everything up to"))


def test_shared_noise_cancels_in_paired_runs() -> None:
    """The same two laws with noise in common have a narrower difference than with their own."""
    widths = {}
    for shared in (0.0, 0.99):
        found = []
        for group in range(3):
            made = compare(
                law("a", FIRST, 3e-3, 10 * group + 1, shared),
                law("b", FIRST, 3e-3, 10 * group + 2, shared),
                [1e15],
                draws=150,
            )
            assert made.is_paired
            interval = made.losses[1e15].interval
            found.append(interval.high - interval.low)
        widths[shared] = float(np.median(found))
    assert widths[0.99] < 0.4 * widths[0.0]


def test_other_runs_or_a_given_noise_are_drawn_independently() -> None:
    first, second = law("a", FIRST, 1e-3, 1), law("b", FIRST, 1e-3, 2)
    fewer = fit_power_law(Points.of("b", X[:4], second.points.losses[:4]))
    assert not compare(first, fewer, [1e15], draws=200).is_paired
    known = Noise(1e-3, math.inf, NoiseSource.GIVEN)
    made = compare(first.with_noise(known), second.with_noise(known), [float(X[2])], draws=2000)
    assert not made.is_paired
    # Each curve's variance at a measured point is sigma^2 times its leverage; see the hat matrix.
    power = np.exp(-first.b * np.log(X / X[2]))
    jacobian = np.stack([power, np.log(X / X[2]) * power, np.ones(5)], axis=1)
    leverage = (jacobian @ np.linalg.pinv(jacobian))[2, 2]
    interval = made.losses[float(X[2])].interval
    expected = 2 * 1.96 * 1e-3 * math.sqrt(2 * leverage)
    assert interval.high - interval.low == pytest.approx(expected, rel=0.1)


def test_pairs_are_matched_by_run_not_by_place() -> None:
    first, second = law("a", FIRST, 3e-3, 31, 0.99), law("b", FIRST, 3e-3, 32, 0.99)
    order = [3, 0, 4, 1, 2]
    points = second.points
    moved = dataclasses.replace(
        points,
        **{name: tuple(getattr(points, name)[i] for i in order)
           for name in ("x", "losses", "seeds", "runs", "keys")},
    )  # fmt: skip
    made, again = (
        compare(first, fit_power_law(each), [1e15], draws=300) for each in (points, moved)
    )
    assert again.losses[1e15].interval.low == pytest.approx(
        made.losses[1e15].interval.low, abs=1e-6
    )
    assert again.C.interval.high == pytest.approx(made.C.interval.high, abs=1e-4)


def test_measured_difference_needs_no_curve() -> None:
    made = compare(law("a", FIRST, 1e-3, 1), law("b", FIRST, 1e-3, 2), [1e15], draws=200)
    gaps = np.array([gap for _, gap in made.measured_by_size])
    assert made.measured is not None
    assert made.measured.estimate == pytest.approx(gaps.mean())
    half = 2.776445 * gaps.std(ddof=1) / math.sqrt(5)  # Student, 4 degrees of freedom
    assert made.measured.interval.high == pytest.approx(gaps.mean() + half, rel=1e-5)
