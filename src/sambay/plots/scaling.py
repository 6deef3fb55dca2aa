"""Fitted laws over their points, and the differences to a baseline: plain numbers in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sambay.plots.canvas import COOL, COOL_MIDDLE, FAINT, INK, QUIET, WARM, chart, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colour, marker and the place in the legend all tell the curves apart.
_STYLES = (
    (COOL, "s"), (WARM, "o"), ("#4d7c0f", "D"), ("#7a5195", "^"), (COOL_MIDDLE, "v"),
    ("#8c6d1f", "P"), ("#c2185b", "X"), ("#00796b", "<"), ("#5d4037", ">"), ("#37474f", "*"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Band:
    """A line over x with the ends of its interval; all of one length."""

    x: Sequence[float]
    middle: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclasses.dataclass(frozen=True)
class ScalingCurve:
    """One architecture: points (means over seeds) with half error bars, its law, and differences.

    `style` numbers its colour and marker. `label` is the law in words, `residuals` are
    (x, measured minus fitted) of every run. `gap` is the fitted difference to the baseline with
    its interval, `gap_points` the measured one, as (x, difference); none for the baseline itself.
    """

    name: str
    style: int
    label: str
    x: Sequence[float]
    losses: Sequence[float]
    errors: Sequence[float]
    law: Band
    residuals: Sequence[tuple[float, float]] = ()
    gap: Band | None = None
    gap_points: Sequence[tuple[float, float]] = ()


@dataclasses.dataclass(frozen=True)
class ScalingPicture:
    """What one picture shows.

    `lines` are vertical lines at D, such as a crossing, by name; `spans` the D in which the two
    curves cannot be told apart. `shows_residuals` puts the distances from the own curve where the
    losses would be, for curves that lie on one another.
    """

    title: str
    x_label: str
    curves: Sequence[ScalingCurve]
    baseline: str
    caption: str
    lines: Sequence[tuple[str, float]] = ()
    spans: Sequence[tuple[float, float]] = ()
    gap_title: str = ""
    shows_residuals: bool = False


def draw_scaling(picture: ScalingPicture) -> Figure:
    """The losses with their laws on the left, differences to the baseline on the right."""
    has_gaps = any(curve.gap is not None for curve in picture.curves)
    rows = -(-len(picture.curves) // 2)
    height = 4.6 + 0.22 * rows
    figure = new_figure(10.6 if has_gaps else 5.6, height)
    styles = {curve.name: _STYLES[curve.style % len(_STYLES)] for curve in picture.curves}
    left = chart(figure, 1, 2 if has_gaps else 1, 1)
    for curve in picture.curves:
        draw_left = _draw_residuals if picture.shows_residuals else _draw_law
        draw_left(left, curve, *styles[curve.name])
    _finish(left, picture.title, picture.x_label, picture.curves)
    left.set_ylabel("nats per token", fontsize=9)
    if has_gaps:
        right = chart(figure, 1, 2, 2)
        for curve in picture.curves:
            if curve.gap is not None:
                _draw_gap(right, curve, curve.gap, *styles[curve.name])
        right.axhline(0.0, color=INK, linewidth=1.0, zorder=2)
        _bound_gaps(right, picture.curves)
        title = picture.gap_title or f"Loss minus that of {picture.baseline}"
        _finish(right, title, picture.x_label, picture.curves)
        _mark(right, picture)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(0.01, 0.995), ncols=2, frameon=False,
        fontsize=9, columnspacing=2.5,
    )  # fmt: skip
    figure.text(0.01, 0.012, picture.caption, fontsize=8, color=QUIET, ha="left", va="bottom")
    figure.tight_layout(rect=(0, 0.035, 1, 1 - (0.12 + 0.22 * rows) / height), w_pad=2.4)
    return figure


def _draw_law(axes: Axes, curve: ScalingCurve, colour: str, marker: str) -> None:
    _draw_band(axes, curve.law, max(curve.x), colour)
    axes.errorbar(
        curve.x, curve.losses, yerr=curve.errors if any(curve.errors) else None, color=colour,
        marker=marker, markersize=5.5, linestyle="none", capsize=2.5, elinewidth=1.2,
        markeredgecolor="white", markeredgewidth=0.8, zorder=4, label=curve.label,
    )  # fmt: skip


def _draw_residuals(axes: Axes, curve: ScalingCurve, colour: str, marker: str) -> None:
    axes.axhline(0.0, color=INK, linewidth=1.0, zorder=2)
    _draw_points(axes, curve.residuals, colour, marker, curve.label)


def _draw_gap(axes: Axes, curve: ScalingCurve, gap: Band, colour: str, marker: str) -> None:
    _draw_band(axes, gap, max(curve.x), colour)
    _draw_points(axes, curve.gap_points, colour, marker, None)


def _draw_band(axes: Axes, band: Band, largest: float, colour: str) -> None:
    """The line, dashed beyond the largest run, over its interval."""
    measured = [i for i, x in enumerate(band.x) if x <= largest * 1.0001]
    beyond = [i for i, x in enumerate(band.x) if i >= measured[-1]]
    for part, style in ((measured, "-"), (beyond, (0, (3, 2)))):
        x, middle = [band.x[i] for i in part], [band.middle[i] for i in part]
        axes.plot(x, middle, color=colour, linewidth=1.6, linestyle=style, zorder=3)
    axes.fill_between(band.x, band.low, band.high, color=colour, alpha=0.14, linewidth=0)


def _draw_points(
    axes: Axes, points: Sequence[tuple[float, float]], colour: str, marker: str, label: str | None
) -> None:
    axes.plot(
        [x for x, _ in points], [value for _, value in points], color=colour, marker=marker,
        markersize=6, linestyle="none", markeredgecolor="white", markeredgewidth=0.8, zorder=4,
        label=label,
    )  # fmt: skip


def _mark(axes: Axes, picture: ScalingPicture) -> None:
    """Vertical lines with their names, and thick parts of the zero line."""
    left, right = axes.get_xlim()
    for low, high in picture.spans:
        axes.plot(
            [max(low, left), min(high, right)], [0.0, 0.0], color=QUIET, linewidth=5, alpha=0.6,
            solid_capstyle="butt", zorder=2,
        )  # fmt: skip
    for name, x in picture.lines:
        axes.axvline(x, color=QUIET, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
        is_right = x > (left * right) ** 0.5
        axes.annotate(
            name, (x, 0.02), xycoords=("data", "axes fraction"), xytext=(-4 if is_right else 4, 0),
            textcoords="offset points", fontsize=8.5, color=QUIET, va="bottom",
            ha="right" if is_right else "left",
        )  # fmt: skip


def _bound_gaps(axes: Axes, curves: Sequence[ScalingCurve]) -> None:
    """Show lines and points whole; bands, which can be very wide, as far as that reaches."""
    shown = [0.0]
    for curve in curves:
        if curve.gap is not None:
            shown += [*curve.gap.middle, *(value for _, value in curve.gap_points)]
            inside = [i for i, x in enumerate(curve.gap.x) if x <= max(curve.x)]
            shown += [curve.gap.low[i] for i in inside] + [curve.gap.high[i] for i in inside]
    room = 0.12 * (max(shown) - min(shown) or 1.0)
    axes.set_ylim(min(shown) - room, max(shown) + room)


def _finish(axes: Axes, title: str, x_label: str, curves: Sequence[ScalingCurve]) -> None:
    axes.set_xscale("log")
    axes.set_xlim(min(curves[0].law.x), max(curves[0].law.x))
    axes.set_title(title, fontsize=10.5, loc="left", color=INK, pad=8)
    axes.set_xlabel(x_label, fontsize=9)
    axes.tick_params(color=FAINT, which="both")
