"""The pictures of `sambay scaling fit`: fitted laws and comparisons turned into plain numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from sambay.plots.scaling import Band, ScalingCurve
    from sambay.scaling.compare import Comparison
    from sambay.scaling.fit_report import FittedCurve

BEYOND = 10.0  # how far beyond the largest run pictures and predictions go
_LINE_POINTS = 121


def draw_pictures(
    out: Path,
    stem: str,
    curves: list[FittedCurve],
    gaps: dict[str, Comparison],
    baseline: str,
    comparisons: list[Comparison],
    title: str,
    x_label: str,
    caption: str,
) -> None:
    """The picture of all curves, and one of the difference of each compared pair."""
    from sambay.plots.canvas import save
    from sambay.plots.scaling import ScalingPicture, draw_scaling

    shown = {curve.law.name: (curve, style) for style, curve in enumerate(curves)}
    all_curves = [_curve(curve, gaps.get(name), style) for name, (curve, style) in shown.items()]
    pictures = {stem: ScalingPicture(title, x_label, all_curves, baseline, caption)}
    for number, pair in enumerate(comparisons, start=1):
        first, second = pair.first.name, pair.second.name
        if first not in shown or second not in shown:
            continue
        (reference, i), (other, j) = shown[second], shown[first]
        lines = [(f"the curves cross at {x:.1e}", x) for x in pair.crossings.points
                 if x <= BEYOND * max(pair.first.x)]  # fmt: skip
        spans = [(region.low, region.high) for region in pair.crossings.regions]
        suffix = f"_compared{number}" if len(comparisons) > 1 else "_compared"
        pictures[stem + suffix] = ScalingPicture(
            "Measured losses minus their own fitted curve", x_label,
            [_curve(reference, None, i), _curve(other, pair, j)], second,
            f"{caption}; grey: not told apart", lines, spans,
            f"{first} minus {second}", shows_residuals=True,
        )  # fmt: skip
    for name, picture in pictures.items():
        figure = draw_scaling(picture)
        for ending in (".png", ".svg"):
            print(f"written to {save(figure, out / (name + ending))}")


def _curve(curve: FittedCurve, gap: Comparison | None, style: int) -> ScalingCurve:
    """Means over seeds with their spread, the law with its band, and the difference to another."""
    import numpy as np

    from sambay.plots.scaling import Band, ScalingCurve

    law = curve.law
    sizes = law.points.sizes
    losses = [np.array(law.points.losses)[law.x == D] for D in sizes]
    x = np.geomspace(sizes[0] / 1.5, sizes[-1] * BEYOND, _LINE_POINTS)

    def band(middle: np.ndarray, low: np.ndarray, high: np.ndarray) -> Band:
        return Band(x.tolist(), middle.tolist(), low.tolist(), high.tolist())

    return ScalingCurve(
        name=law.name,
        style=style,
        label=rf"{law.name}:  ${law.A:.4g}\,D^{{-{law.b:.3f}}} + {law.C:.3f}$",
        x=sizes.tolist(),
        losses=[float(own.mean()) for own in losses],
        errors=[float(own.std(ddof=1)) if len(own) > 1 else 0.0 for own in losses],
        law=band(law.predict(x), *curve.draws.band(x, level=curve.level)),
        residuals=list(zip(law.points.x, law.residuals.tolist(), strict=True)),
        gap=None if gap is None else band(*gap.band(x)),
        gap_points=() if gap is None else gap.measured_by_size,
    )
