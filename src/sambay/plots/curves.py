"""Loss curves and speed curves: measured points in, a labelled picture out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sambay.plots.canvas import COOL, FAINT, INK, QUIET, WARM, chart, legend, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colour and marker both tell the curves apart, so the pictures survive grey print.
_STYLES = ((WARM, "o"), (COOL, "s"), ("#7a5195", "^"), ("#4d7c0f", "D"))


@dataclasses.dataclass(frozen=True)
class Curve:
    """Measured points under a name; all curves of one name share a colour in every panel."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    is_background: bool = False  # thin and pale, without markers, such as a training loss


@dataclasses.dataclass(frozen=True)
class Panel:
    """One chart: its curves, its axes in words, and horizontal lines to compare with."""

    title: str
    x_label: str
    curves: Sequence[Curve]
    lines: Mapping[str, float] = dataclasses.field(default_factory=dict)
    y_from_zero: bool = False
    x_in_powers_of_two: bool = False
    y_top: float | None = None


def draw_panels(panels: Sequence[Panel], caption: str) -> Figure:
    """The panels side by side with one legend above and a caption below them."""
    figure = new_figure(4.3 * len(panels) + 0.3, 4.2)
    styles: dict[str, tuple[str, str]] = {}
    for panel in panels:
        for curve in panel.curves:
            styles.setdefault(curve.name, _STYLES[len(styles) % len(_STYLES)])
    for index, panel in enumerate(panels):
        _draw_panel(chart(figure, 1, len(panels), index + 1), panel, styles)
    legend(figure, styles)
    figure.text(0.01, 0.015, caption, fontsize=8, color=QUIET, ha="left", va="bottom")
    figure.tight_layout(rect=(0, 0.045, 1, 0.93), w_pad=2.0)
    return figure


def _draw_panel(axes: Axes, panel: Panel, styles: Mapping[str, tuple[str, str]]) -> None:
    for curve in panel.curves:
        colour, marker = styles[curve.name]
        if curve.is_background:
            axes.plot(curve.x, curve.y, color=colour, linewidth=0.9, alpha=0.30, zorder=2)
        else:
            axes.plot(
                curve.x, curve.y, color=colour, marker=marker, markersize=5.5, linewidth=2.0,
                markeredgecolor="white", markeredgewidth=0.8, zorder=3,
            )  # fmt: skip
    highest = max(panel.lines.values(), default=0.0)
    for name, value in panel.lines.items():
        axes.axhline(value, color=QUIET, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
        is_highest = value == highest  # lines lie close together, so the others are named below
        axes.annotate(
            name, (0.0, value), xycoords=("axes fraction", "data"),
            xytext=(4, 3 if is_highest else -3), va="bottom" if is_highest else "top",
            textcoords="offset points", fontsize=8.5, color=QUIET, ha="left",
        )  # fmt: skip
    axes.set_title(panel.title, fontsize=10.5, loc="left", color=INK, pad=8)
    axes.set_xlabel(panel.x_label, fontsize=9)
    if panel.x_in_powers_of_two:
        ticks = sorted({value for curve in panel.curves for value in curve.x})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [_short(tick) for tick in ticks])
        axes.minorticks_off()
    if panel.y_from_zero:
        axes.set_ylim(bottom=0)
    if panel.y_top is not None:
        axes.set_ylim(top=panel.y_top)
    if len(panel.lines) > 1 and not panel.y_from_zero:  # room for the name below the lowest
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom=min(bottom, min(panel.lines.values()) - 0.08 * (top - bottom)))
    axes.tick_params(color=FAINT)


def _short(value: float) -> str:
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"
