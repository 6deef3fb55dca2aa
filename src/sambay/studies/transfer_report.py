"""A learning-rate sweep as a table, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from sambay.files import atomic_write, write_json
from sambay.plots.canvas import save
from sambay.plots.transfer import RateCurve, RatePanel, draw_transfer
from sambay.studies.names import TITLES
from sambay.studies.transfer import FORMAT_VERSION, Curve, Judged, Transfer

JSON, PAGE, PICTURE = "transfer.json", "transfer.md", "transfer"
_LOSS_NAMES = {
    Judged.VALIDATION: "validation loss at the end",
    Judged.TRAINING: "training loss, mean of the last tenth",
}


def page(result: Transfer) -> list[str]:
    """The losses by depth and rate as a Markdown table for each parametrisation, and verdicts.

    The best of a row is bold. Rates are factors of the one that the recipe gives a depth.
    """
    lines: list[str] = []
    for parametrization, shift in result.shifts.items():
        heads = ["depth", "rate x 1", *(f"x {factor:g}" for factor in result.factors)]
        heads += ["best x", "by parabola x"]
        cells = [heads, ["---", *("--:" for _ in heads[1:])]]
        for curve in result.curves:
            if curve.parametrization is parametrization:
                cells.append(_row(curve, result.factors))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        title = f"{result.architecture}, {TITLES[parametrization]}: {_LOSS_NAMES[result.judged]}"
        lines += [title, ""]
        for row in cells:
            padded = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("| " + " | ".join(padded) + " |")
        by = shift.by_parabola
        moved = "" if by is None else f" ({by:.2f} steps by parabola)"
        lines += ["", f"{shift.verdict}{moved}.", ""]
    return lines


def _row(curve: Curve, factors: list[float]) -> list[str]:
    best = curve.optimum
    cells = [str(curve.depth), f"{curve.base_rate:.3g}"]
    for factor in factors:
        loss = curve.losses.get(factor)
        shown = curve.states.get(factor, "-") if loss is None else f"{loss:.4f}"
        is_best = best is not None and factor == best.factor
        cells.append(f"**{shown}**" if is_best else shown)
    if best is None:
        return [*cells, "-", "-"]
    vertex = "-" if best.vertex is None else f"{best.vertex:.3g}"
    return [*cells, f"{best.factor:g}", vertex]


def to_json(result: Transfer) -> dict[str, Any]:
    """Curves, optima and verdicts as plain values."""
    return {
        "format_version": FORMAT_VERSION,
        "architecture": result.architecture,
        "judged": result.judged.value,
        "factors": result.factors,
        "curves": [
            {
                "parametrization": curve.parametrization.value,
                "depth": curve.depth,
                "base_learning_rate": curve.base_rate,
                "losses": [curve.losses.get(factor) for factor in result.factors],
                "states": [curve.states.get(factor, "finished") for factor in result.factors],
                "optimum": None if curve.optimum is None else dataclasses.asdict(curve.optimum),
            }
            for curve in result.curves
        ],
        "shifts": {
            parametrization.value: dataclasses.asdict(shift)
            for parametrization, shift in result.shifts.items()
        },
    }


def panels(result: Transfer) -> list[RatePanel]:
    """What the picture shows: for each parametrisation a curve for each depth that has a loss."""
    made = []
    for parametrization, shift in result.shifts.items():
        curves = []
        for curve in result.curves:
            points = [
                (factor, loss)
                for factor, loss in sorted(curve.losses.items())
                if loss is not None and math.isfinite(loss)
            ]
            if curve.parametrization is parametrization and points:
                best = curve.optimum
                curves.append(RateCurve(curve.depth, points, None if best is None else best.factor))
        made.append(RatePanel(TITLES[parametrization], curves, shift.verdict.partition(":")[0]))
    return made


def write(result: Transfer, out: Path) -> list[Path]:
    """Write transfer.json, transfer.md and, as far as there is a loss, transfer.png and .svg.

    Raises:
        WriteFailed: the operating system refused.
        MissingPackage: matplotlib is not installed (the other files are written).
    """
    write_json(out / JSON, to_json(result))
    with atomic_write(out / PAGE) as file:
        file.write(("\n".join(page(result)) + "\n").encode())
    written = [out / JSON, out / PAGE]
    if any(panel.curves for panel in panels(result)):
        figure = draw_transfer(
            panels(result),
            y_label=_LOSS_NAMES[result.judged],
            caption=f"{result.architecture}; marked: the best of the grid at each depth",
        )
        written += [save(figure, out / f"{PICTURE}{suffix}") for suffix in (".png", ".svg")]
    return written
