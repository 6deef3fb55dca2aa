"""Accuracies with their errors against length, window or depth: plain numbers in, a picture out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sambay.plots.canvas import (
    COOL,
    COOL_MIDDLE,
    FAINT,
    INK,
    PAPER,
    QUIET,
    WARM,
    chart,
    new_figure,
    text_width,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 6.4, 4.1  # without the legend
# Colour and marker both tell the curves apart, so the pictures survive grey print.
_STYLES = (
    (WARM, "o"), (COOL, "s"), ("#7a5195", "^"), ("#4d7c0f", "D"), (COOL_MIDDLE, "v"),
    ("#8c6d1f", "P"), ("#c2185b", "X"), ("#00796b", "<"), ("#5d4037", ">"), ("#37474f", "p"),
)  # fmt: skip
_APART = 0.013  # of the width of the axes, between points that would cover each other's bars
_LINE_SPACE = 5.0  # per cent, between the names of lines


@dataclass(frozen=True)
class EvaluationCurve:
    """Shares from 0 to 1 under a name, with the ends of their error bars.

    is_published: drawn hollow and thin, in the colour of one's own curve of the same name.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    is_published: bool = False


@dataclass(frozen=True)
class EvaluationChart:
    """What one picture shows.

    lines: shares that do not depend on x, by name, across the chart.
    """

    title: str
    x_label: str
    curves: Sequence[EvaluationCurve]
    x_ticks: Mapping[float, str]
    lines: Sequence[tuple[str, float]] = ()
    x_is_logarithmic: bool = False
    x_limits: tuple[float, float] | None = None
    y_label: str = "accuracy (%)"


def draw_evaluation(content: EvaluationChart, caption: str) -> Figure:
    """The chart with a legend above and a caption below it; always the whole range of shares.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    names = list(dict.fromkeys(curve.name for curve in content.curves))
    labels = [_label(curve) for curve in content.curves]
    widest = max((text_width(label, 9) for label in labels), default=1.0)
    columns = max(1, min(len(labels), int((_WIDTH - 0.2) / (widest + 0.62))))
    rows = math.ceil(len(labels) / columns)
    height = _HEIGHT + 0.21 * rows
    figure = new_figure(_WIDTH, height)
    axes = chart(figure, 1, 1, 1)
    _scale(axes, content)
    for number, curve in enumerate(content.curves):
        colour, marker = _STYLES[names.index(curve.name) % len(_STYLES)]
        _draw(axes, curve, _places(axes, content.curves, number), colour, marker, labels[number])
    _draw_lines(axes, content.lines)
    axes.set_title(content.title, fontsize=10.5, loc="left", color=INK, pad=8)
    handles, shown = axes.get_legend_handles_labels()
    if shown:
        figure.legend(
            handles, shown, loc="upper left", bbox_to_anchor=(0.005, 0.995), ncols=columns,
            frameon=False, fontsize=9, columnspacing=1.6, handlelength=1.8,
        )  # fmt: skip
    figure.text(0.01, 0.012, caption, fontsize=8, color=QUIET, ha="left", va="bottom")
    figure.tight_layout(rect=(0, 0.04, 1, 1 - (0.1 + 0.21 * rows) / height))
    return figure


def _label(curve: EvaluationCurve) -> str:
    return f"{curve.name}, paper" if curve.is_published else curve.name


def _scale(axes: Axes, content: EvaluationChart) -> None:
    ticks = sorted(content.x_ticks)
    low, high = content.x_limits or (ticks[0], ticks[-1])
    if content.x_is_logarithmic:
        axes.set_xscale("log", base=2)
        if content.x_limits is None:
            room = (high / low) ** 0.08 if high > low else 2.0
            low, high = low / room, high * room
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [content.x_ticks[tick] for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(content.x_label, fontsize=9)
    axes.set_ylim(-3, 103)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel(content.y_label, fontsize=9)
    axes.tick_params(color=FAINT)


def _places(axes: Axes, curves: Sequence[EvaluationCurve], number: int) -> list[float]:
    """The places of one curve's points, those of several curves at one x side by side."""
    low, high = axes.get_xlim()
    places = []
    for value in curves[number].x:
        there = [other for other, curve in enumerate(curves) if value in curve.x]
        shift = _APART * (there.index(number) - (len(there) - 1) / 2)
        if axes.get_xscale() == "log":
            places.append(value * (high / low) ** shift)
        else:
            places.append(value + (high - low) * shift)
    return places


def _draw(
    axes: Axes, curve: EvaluationCurve, x: Sequence[float], colour: str, marker: str, label: str
) -> None:
    y = [100 * value for value in curve.y]
    below = [100 * (value - max(low, 0)) for value, low in zip(curve.y, curve.low, strict=True)]
    above = [100 * (min(high, 1) - value) for value, high in zip(curve.y, curve.high, strict=True)]
    look: dict[str, Any] = {"linewidth": 2.0, "markeredgecolor": PAPER, "markeredgewidth": 0.8}
    if curve.is_published:
        look = {
            "linewidth": 1.0, "linestyle": (0, (4, 2)), "markeredgecolor": colour,
            "markerfacecolor": PAPER, "markeredgewidth": 1.2,
        }  # fmt: skip
    axes.errorbar(
        x, y, yerr=[below, above], color=colour, marker=marker, markersize=6, capsize=2.5,
        elinewidth=1.0, zorder=3 if curve.is_published else 4, label=label, **look,
    )  # fmt: skip


def _draw_lines(axes: Axes, lines: Sequence[tuple[str, float]]) -> None:
    """Lines across with their names at the right of the chart."""
    lowest = 0.0
    for name, share in sorted(lines, key=lambda line: line[1]):
        axes.axhline(100 * share, color=QUIET, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
        lowest = max(lowest, 100 * share)
        axes.annotate(
            name, (1.01, lowest), xycoords=("axes fraction", "data"), fontsize=8.5, color=QUIET,
            ha="left", va="center", annotation_clip=False,
        )  # fmt: skip
        lowest += _LINE_SPACE
