"""The picture of a coordinate check: how quantities grow with size, relative to the smallest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sambay.plots.canvas import (
    COOL,
    COOL_LIGHT,
    COOL_MIDDLE,
    INK,
    QUIET,
    WARM,
    WARM_LIGHT,
    chart,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = (WARM, COOL, "#7a5195", "#4d7c0f", COOL_MIDDLE, WARM_LIGHT, INK, COOL_LIGHT, "#b5487a")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_TICKS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_MOST_DECADES = 2.5  # of growth that a panel shows; what leaves it is far from flat anyway


@dataclasses.dataclass(frozen=True)
class Row:
    """The panels of one measure, a column each: by quantity the values at the sizes."""

    title: str
    columns: Sequence[Mapping[str, Sequence[float]]]


def draw_coordinates(
    sizes: Sequence[float],
    columns: Sequence[str],
    rows: Sequence[Row],
    *,
    size_label: str,
    caption: str,
) -> Figure:
    """Rows of panels with logarithmic axes; every curve begins at 1, so a flat one stays there.

    All panels of a row share their scale and a legend at its right. Values that are not positive
    numbers are left out.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    figure = new_figure(3.1 * len(columns) + 2.3, 2.75 * len(rows) + 0.75)
    for number, row in enumerate(rows):
        names = list(dict.fromkeys(name for column in row.columns for name in column))
        limits = _limits(
            [_relative(values) for column in row.columns for values in column.values()]
        )
        for place, (column, title) in enumerate(zip(row.columns, columns, strict=True)):
            axes = chart(figure, len(rows), len(columns), number * len(columns) + place + 1)
            for name, values in column.items():
                _draw(axes, sizes, values, names.index(name), name)
            _dress(axes, sizes, limits)
            if number == 0:
                axes.set_title(title, fontsize=10.5, loc="left", pad=8)
            if place == 0:
                axes.set_ylabel(row.title, fontsize=9)
            if number == len(rows) - 1:
                axes.set_xlabel(size_label, fontsize=9)
            if place == len(columns) - 1:
                axes.legend(
                    loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=7,
                    handlelength=1.6, labelspacing=0.35,
                )  # fmt: skip
    figure.text(0.01, 0.01, caption, fontsize=8, color=QUIET, ha="left", va="bottom")
    figure.tight_layout(rect=(0, 0.04, 1, 1), w_pad=0.8, h_pad=1.2)
    return figure


def _relative(values: Sequence[float]) -> list[float]:
    """The values divided by the first; NaN where there is no such ratio on a logarithmic axis."""
    first = values[0]
    usable = math.isfinite(first) and first > 0
    return [
        value / first if usable and math.isfinite(value) and value > 0 else math.nan
        for value in values
    ]


def _draw(
    axes: Axes, sizes: Sequence[float], values: Sequence[float], number: int, name: str
) -> None:
    axes.plot(
        sizes, _relative(values), label=name, color=_COLOURS[number % len(_COLOURS)],
        marker=_MARKERS[number % len(_MARKERS)], markersize=4, linewidth=1.3,
        linestyle="-" if number < len(_COLOURS) else (0, (4, 2)),
        markeredgecolor="white", markeredgewidth=0.5, zorder=3,
    )  # fmt: skip


def _limits(curves: Sequence[Sequence[float]]) -> tuple[float, float]:
    relative = [value for curve in curves for value in _relative(curve)]
    exponents = [math.log10(value) for value in relative if not math.isnan(value)]
    low, high = min(exponents, default=0.0), max(exponents, default=0.0)
    low, high = max(min(low, -0.5), -_MOST_DECADES), min(max(high, 0.5), _MOST_DECADES)
    return 10 ** (low - 0.1), 10 ** (high + 0.1)


def _dress(axes: Axes, sizes: Sequence[float], limits: tuple[float, float]) -> None:
    axes.axhline(1.0, color=QUIET, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(limits)
    ticks = [tick for tick in _TICKS if limits[0] <= tick <= limits[1]]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.minorticks_off()
