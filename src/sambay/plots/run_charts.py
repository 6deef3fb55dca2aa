"""The charts of one training run: each a small picture, as SVG text to put into a page."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sambay.plots.canvas import (
    COOL,
    COOL_MIDDLE,
    INK,
    QUIET,
    WARM,
    WARM_LIGHT,
    chart,
    new_figure,
    text_width,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 5.8, 3.35
_COLOURS = (WARM, COOL, "#7a5195", "#4d7c0f", COOL_MIDDLE, WARM_LIGHT)
_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))  # after one round of colours
_LOG_FROM = 8.0  # the ratio of the greatest value to the least
_START = 0.05  # of the steps: what may be cut off, see `Chart`
_BEHIND_TEXT = {"facecolor": "white", "edgecolor": "none", "pad": 1.2, "alpha": 0.85}
_POINTS = 400  # of a series that are drawn; more cannot be told apart


@dataclasses.dataclass(frozen=True)
class Series:
    """Measured values by step.

    As "thin" they are the pale background of another series; as "total" a thin line above all
    others.
    """

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    style: str = "line"  # or "thin", "points", "total"


@dataclasses.dataclass(frozen=True)
class Chart:
    """What is drawn into one picture.

    line: a value to compare with, and its name.
    cut_start: high values of the first steps may leave the picture, which then says so.
    """

    title: str
    unit: str
    series: Sequence[Series]
    line: tuple[float, str] | None = None
    from_zero: bool = False
    cut_start: bool = False


def draw_chart(content: Chart) -> Figure:
    """The picture of a chart that has at least one value.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    figure = new_figure(_WIDTH, _HEIGHT)
    axes = chart(figure, 1, 1, 1)
    for number, series in enumerate(_foreground(content)):
        _draw(axes, series, number)
    for series in content.series:
        if series.style == "thin":
            axes.plot(
                *thinned(series.steps, series.values),
                color=_colour_of(content, series.name), linewidth=0.8, alpha=0.35, zorder=2,
            )  # fmt: skip
    _scale(axes, content)
    value, name = content.line or (math.nan, "")
    bottom, top = axes.get_ylim()
    if bottom <= value <= top:
        axes.axhline(value, color=QUIET, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            name, (1.0, value), xycoords=("axes fraction", "data"), xytext=(-2, 3),
            textcoords="offset points", fontsize=8, color=QUIET, ha="right", va="bottom", zorder=6,
            bbox=_BEHIND_TEXT,
        )  # fmt: skip
    last = max(step for series in content.series for step in series.steps)
    axes.set_xlim(0, last * 1.02)
    axes.set_xlabel("step", fontsize=9)
    axes.locator_params(axis="x", integer=True)
    axes.xaxis.set_major_formatter(lambda value, _: short(value, last))
    figure.text(0.012, 0.975, content.title, fontsize=11, fontweight="bold", va="top")
    handles, labels = axes.get_legend_handles_labels()
    rows = 0
    if len(handles) > 1:
        widest = max(text_width(label, 8.5) for label in labels)
        columns = min(len(handles), max(1, int((_WIDTH - 0.1) / (widest + 0.42))))
        rows = math.ceil(len(handles) / columns)
        figure.legend(
            handles, labels, loc="upper left", bbox_to_anchor=(0.0, 0.925), ncols=columns,
            frameon=False, fontsize=8.5, handlelength=1.4, columnspacing=1.2, handletextpad=0.5,
        )  # fmt: skip
    axes.set_ylabel(content.unit, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.94 - 0.062 * rows), pad=0.5)
    return figure


def svg(content: Chart) -> str:
    """The picture of a chart as SVG; the same chart gives the same text.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    text = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    draw_chart(content).savefig(text, format="svg", metadata=metadata)
    return text.getvalue()


def thinned(
    steps: Sequence[float], values: Sequence[float], points: int = _POINTS
) -> tuple[list[float], list[float]]:
    """At most about `points` of a curve: of each stretch the least and the greatest value."""
    width = math.ceil(2 * len(steps) / points)
    if width <= 2:
        return list(steps), list(values)
    kept: list[int] = []
    for start in range(0, len(steps), width):
        stretch = range(start, min(start + width, len(steps)))
        ends = {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
        kept += sorted(ends)
    return [steps[index] for index in kept], [values[index] for index in kept]


def short(value: float, largest: float | None = None) -> str:
    """A number for an axis whose end is `largest`: 0.02, 150, 1,500, 25k, 1.5M."""
    size = abs(value if largest is None else largest)
    for limit, divisor, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= limit and value != 0:
            return f"{value / divisor:.4g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 and value == round(value) else f"{value:.4g}"


def _foreground(content: Chart) -> list[Series]:
    return [series for series in content.series if series.style != "thin"]


def _colour_of(content: Chart, name: str) -> str:
    """The colour of a thin series: that of the line it is behind, the one that begins like it."""
    for number, series in enumerate(_foreground(content)):
        if series.name.startswith(name):
            return _COLOURS[number % len(_COLOURS)]
    return QUIET


def _draw(axes: Axes, series: Series, number: int) -> None:
    steps, values = thinned(series.steps, series.values)
    if series.style == "total":
        axes.plot(
            steps, values, color=INK, linewidth=0.9, linestyle=(0, (1, 1)), label=series.name,
            marker="." if len(steps) == 1 else None, zorder=5,
        )  # fmt: skip
        return
    is_marked = series.style == "points" or len(steps) == 1
    is_sparse = len(steps) <= 20
    axes.plot(
        steps, values, color=_COLOURS[number % len(_COLOURS)], label=series.name, linewidth=1.6,
        linestyle=_DASHES[number // len(_COLOURS) % len(_DASHES)],
        marker="o" if is_marked else None, markersize=4.5 if is_sparse else 2.4,
        markeredgecolor="white", markeredgewidth=0.7 if is_sparse else 0.0,
        zorder=4 if is_marked else 3,
    )  # fmt: skip


def _scale(axes: Axes, content: Chart) -> None:
    """Choose between logarithm and plain numbers, and what part of the values to show."""
    values = [value for series in content.series for value in series.values]
    low, high = min(values), max(values)
    if content.from_zero:
        axes.set_ylim(0, high * 1.08 or 1.0)
    elif low > 0 and high / low > _LOG_FROM:
        _log_ticks(axes, low, high)
        return
    elif content.cut_start:
        last = max(step for series in content.series for step in series.steps)
        later = [
            value
            for series in content.series
            for step, value in zip(series.steps, series.values, strict=True)
            if step > last * _START
        ]
        top = max(later, default=high)
        if high - low > 1.5 * (top - low) > 0:
            axes.set_ylim(low - 0.05 * (top - low), top + 0.05 * (top - low))
            axes.annotate(
                f"begins at {high:.4g}", (0.99, 0.985), xycoords="axes fraction",
                fontsize=8, color=QUIET, ha="right", va="top", zorder=6,
                bbox=_BEHIND_TEXT,
            )  # fmt: skip
    top = axes.get_ylim()[1]
    axes.yaxis.set_major_formatter(lambda value, _: short(value, top))


def _log_ticks(axes: Axes, low: float, high: float) -> None:
    axes.set_yscale("log")
    axes.set_ylim(low / 1.25, high * 1.25)
    decades = math.log10(high / low)
    factors = (1, 2, 5) if decades < 2 else (1, 3) if decades < 3 else (1,)
    every = 1 if decades < 7 else math.ceil(decades / 6)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    ticks = [tick for tick in ticks if low / 1.25 <= tick <= high * 1.25]
    axes.set_yticks(ticks, [short(tick) for tick in ticks])
    axes.minorticks_off()
