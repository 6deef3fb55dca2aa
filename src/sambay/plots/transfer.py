"""The picture of a learning-rate sweep: loss against rate, a curve for each depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sambay.plots.canvas import INK, QUIET, chart, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# From light to dark as models grow, so that the order needs no legend.
_RAMP = ("#f4a83c", "#e2722b", "#b53a2a", "#7b2144", "#3d1a4f", "#14122b")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_SHOWN = 1.5  # nats above the best of a panel; higher losses would press the rest flat


@dataclass(frozen=True)
class RateCurve:
    """The losses of one depth: (factor on the rate, loss) ascending, and the best factor."""

    depth: int
    points: Sequence[tuple[float, float]]
    best: float | None


@dataclass(frozen=True)
class RatePanel:
    """The curves of one parametrisation; `note` says what they show."""

    title: str
    curves: Sequence[RateCurve]
    note: str


def draw_transfer(panels: Sequence[RatePanel], *, y_label: str, caption: str) -> Figure:
    """A panel for each parametrisation, all with the same axes; the best rates are marked.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    figure = new_figure(4.0 * len(panels) + 0.4, 4.2)
    depths = sorted({curve.depth for panel in panels for curve in panel.curves})
    losses = [loss for panel in panels for curve in panel.curves for _, loss in curve.points]
    factors = sorted({x for panel in panels for curve in panel.curves for x, _ in curve.points})
    low, high = min(losses), min(max(losses), min(losses) + _SHOWN)
    margin = 0.06 * max(high - low, 0.05)
    for number, panel in enumerate(panels):
        axes = chart(figure, 1, len(panels), number + 1)
        for curve in panel.curves:
            _draw(axes, curve, depths.index(curve.depth), len(depths))
        axes.set_xscale("log", base=2)
        axes.set_xticks(factors, [f"{factor:g}" for factor in factors])
        axes.minorticks_off()
        axes.set_ylim(low - margin, high + margin)
        axes.set_title(panel.title, fontsize=10.5, loc="left", pad=20)
        axes.annotate(
            panel.note, (0.0, 1.0), xycoords="axes fraction", xytext=(0, 6),
            textcoords="offset points", fontsize=8.5, color=QUIET,
        )  # fmt: skip
        axes.set_xlabel("learning rate, times that of the rules", fontsize=9)
        if number == 0:
            axes.set_ylabel(y_label, fontsize=9)
        if panel.curves:
            axes.legend(frameon=False, fontsize=8.5, loc="upper center")
    figure.text(0.01, 0.015, caption, fontsize=8, color=QUIET, ha="left", va="bottom")
    figure.tight_layout(rect=(0, 0.045, 1, 1), w_pad=1.5)
    return figure


def _draw(axes: Axes, curve: RateCurve, number: int, of: int) -> None:
    colour = _RAMP[round(number * (len(_RAMP) - 1) / max(of - 1, 1))]
    x, y = [point[0] for point in curve.points], [point[1] for point in curve.points]
    axes.plot(
        x, y, label=f"depth {curve.depth}", color=colour, linewidth=1.8, zorder=3,
        marker=_MARKERS[number % len(_MARKERS)], markersize=4.5,
        markeredgecolor="white", markeredgewidth=0.6,
    )  # fmt: skip
    for factor, loss in curve.points:
        if factor == curve.best:
            axes.plot(
                [factor], [loss], color=INK, marker="o", markersize=10, markerfacecolor="none",
                markeredgewidth=1.2, zorder=4,
            )  # fmt: skip
