"""Fits, intervals and comparisons of one table in Markdown and as plain values for JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from sambay.scaling.compare import Comparison, Difference, verdict
from sambay.scaling.fit import Noise, NoiseSource, PowerLaw
from sambay.scaling.fit_intervals import LEVEL, Bootstrap, Interval, bootstrap, profile_interval
from sambay.scaling.fit_solver import Quantity

_CONSTANTS = (Quantity.A, Quantity.B, Quantity.C)


@dataclasses.dataclass(frozen=True)
class FittedCurve:
    """A law with both kinds of interval of its constants and of its loss at D = `at`."""

    law: PowerLaw
    draws: Bootstrap
    profile: dict[Quantity, Interval]
    percentile: dict[Quantity, Interval]
    at: float
    level: float


def with_intervals(
    law: PowerLaw, at: float, *, draws: int, seed: int = 0, level: float = LEVEL
) -> FittedCurve:
    """The law with profile and bootstrap intervals."""
    drawn = bootstrap(law, draws=draws, seed=seed)
    low, high = drawn.band(np.array([at]), level=level)
    quantities = (*_CONSTANTS, Quantity.LOSS)
    return FittedCurve(
        law=law,
        draws=drawn,
        profile={one: profile_interval(law, one, at=at, level=level) for one in quantities},
        percentile={
            **{one: drawn.interval(one, level=level) for one in _CONSTANTS},
            Quantity.LOSS: Interval(float(low[0]), float(high[0])),
        },
        at=at,
        level=level,
    )


def markdown(
    curves: Sequence[FittedCurve],
    comparisons: Sequence[Comparison],
    *,
    unit: str,
    level: float,
    notes: Sequence[str] = (),
) -> str:
    """The tables of constants and intervals, the verdicts, and what a reader must know."""
    percent = f"{100 * level:g} %"
    blocks = [f"L = A D^-b + C, D in {unit}, L in nats per token.", constants_table(curves)]
    blocks.append(f"{percent} intervals: profile / bootstrap.")
    blocks.append(_intervals_table(curves))
    for comparison in comparisons:
        first, second = comparison.first.name, comparison.second.name
        blocks.append(f"**{first} against {second}** ({_pairing(comparison)})")
        blocks.append("\n".join(f"- {line}" for line in verdict(comparison)))
    remarks = [*_remarks(curves), *notes]
    if remarks:
        blocks.append("\n".join(f"- {remark}" for remark in remarks))
    return "\n\n".join(blocks) + "\n"


def constants_table(curves: Sequence[FittedCurve]) -> str:
    """A, b and C with standard errors, R^2 and the noise, one line per curve."""
    lines = [
        "| curve | runs | A | b | C | R² | noise of a run, nats | largest residual |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for curve in curves:
        law = curve.law
        lines.append(
            f"| {law.name} | {len(law.x)} | {law.A:.2f} ± {law.errors['A']:.2f} "
            f"| {law.b:.4f} ± {law.errors['b']:.4f} | {law.C:.3f} ± {law.errors['C']:.3f} "
            f"| {law.r_squared:.6f} | {_noise(law.noise)} "
            f"| {np.abs(law.residuals).max():.4f} |"
        )
    return "\n".join(lines)


def as_values(
    curves: Sequence[FittedCurve],
    comparisons: Sequence[Comparison],
    *,
    unit: str,
    level: float,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The same as `markdown`, and the residuals, for JSON; infinite ends are null."""
    return {
        "model": "L = A D^-b + C",
        "unit_of_D": unit,
        "level": level,
        "curves": [_curve_values(curve) for curve in curves],
        "comparisons": [_comparison_values(comparison) for comparison in comparisons],
        "notes": [*_remarks(curves), *notes],
    }


def _intervals_table(curves: Sequence[FittedCurve]) -> str:
    at = curves[0].at
    lines = [
        f"| curve | b | C | loss at D = {at:.3g} |",
        "| --- | --- | --- | --- |",
    ]
    for curve in curves:
        cells = [
            f"{_span(curve.profile[one], digits)} / {_span(curve.percentile[one], digits)}"
            for one, digits in ((Quantity.B, 4), (Quantity.C, 3), (Quantity.LOSS, 4))
        ]
        loss = float(curve.law.predict(np.array(at)))
        lines.append(f"| {curve.law.name} | {cells[0]} | {cells[1]} | {loss:.4f}: {cells[2]} |")
    return "\n".join(lines)


def _span(interval: Interval, digits: int) -> str:
    return f"{interval.low:.{digits}f} to {interval.high:.{digits}f}"


def _noise(noise: Noise) -> str:
    freedom = f"{noise.freedom:g}" if np.isfinite(noise.freedom) else "known"
    source = "" if noise.source is NoiseSource.RESIDUALS else f", {noise.source.value}"
    return f"{noise.sigma:.5f} ({freedom}{source})"


def _pairing(comparison: Comparison) -> str:
    if comparison.is_paired:
        return "the same runs: their noise is drawn together"
    return "different runs, or noise that is not from the residuals: drawn independently"


def _remarks(curves: Sequence[FittedCurve]) -> list[str]:
    remarks = []
    for curve in curves:
        law = curve.law
        if law.at_bound:
            held = " and ".join(law.at_bound)
            remarks.append(f"{law.name}: {held} is held by its bound, so the least squares have no "
                           "minimum inside and the standard errors mean little.")  # fmt: skip
        if curve.percentile[Quantity.C].low <= 1e-9 or curve.profile[Quantity.C].low <= 1e-9:
            remarks.append(f"{law.name}: the data do not exclude C = 0, a pure power law.")
        if law.seed_noise is not None and law.adequacy is not None:
            fits = "fits" if law.noise.source is not NoiseSource.LACK_OF_FIT else "does not fit"
            remarks.append(
                f"{law.name}: seeds differ by {law.seed_noise.sigma:.5f} (standard deviation, "
                f"{law.seed_noise.freedom:g} degrees of freedom); with this noise the curve {fits} "
                f"the sizes (p = {law.adequacy:.2g})."
            )
    return remarks


def _curve_values(curve: FittedCurve) -> dict[str, Any]:
    law = curve.law
    return {
        "name": law.name,
        "A": law.A,
        "b": law.b,
        "C": law.C,
        "standard_errors": law.errors,
        "r_squared": law.r_squared,
        "noise": _noise_values(law.noise),
        "seed_noise": None if law.seed_noise is None else _noise_values(law.seed_noise),
        "probability_of_misfit": law.adequacy,
        "at_bound": list(law.at_bound),
        "profile": {one.value: _ends(interval) for one, interval in curve.profile.items()},
        "bootstrap": {one.value: _ends(interval) for one, interval in curve.percentile.items()},
        "loss_at": curve.at,
        "runs": [
            {"run": run, "D": D, "seed": seed, "loss": loss, "residual": residual}
            for run, D, seed, loss, residual in zip(
                law.points.runs, law.points.x, law.points.seeds, law.points.losses,
                law.residuals.tolist(), strict=True,
            )
        ],
    }  # fmt: skip


def _comparison_values(comparison: Comparison) -> dict[str, Any]:
    crossings = comparison.crossings
    return {
        "first": comparison.first.name,
        "second": comparison.second.name,
        "is_paired": comparison.is_paired,
        "C": _difference_values(comparison.C),
        "b": _difference_values(comparison.b),
        "losses": [
            {"D": D, **_difference_values(gap)} for D, gap in comparison.losses.items()
        ],
        "measured": None
        if comparison.measured is None
        else _difference_values(comparison.measured),
        "measured_by_size": [list(pair) for pair in comparison.measured_by_size],
        "crossings": {
            "searched": [crossings.low, crossings.high],
            "points": list(crossings.points),
            "not_excluded": [_ends(region) for region in crossings.regions],
        },
        "verdict": verdict(comparison),
    }  # fmt: skip


def _difference_values(difference: Difference) -> dict[str, Any]:
    return {
        "first_minus_second": difference.estimate,
        "interval": _ends(difference.interval),
        "is_clear": difference.is_clear,
    }


def _noise_values(noise: Noise) -> dict[str, Any]:
    freedom = float(noise.freedom) if np.isfinite(noise.freedom) else None
    return {"sigma": noise.sigma, "freedom": freedom, "source": noise.source.value}


def _ends(interval: Interval) -> list[float | None]:
    return [float(end) if np.isfinite(end) else None for end in (interval.low, interval.high)]
