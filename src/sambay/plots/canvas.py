"""The one file that opens matplotlib: a surface in inches, chart axes, the project's colours.

No pyplot and no global state: figures are made and saved without a display, and the same input
gives the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sambay.errors import ConfigError, MissingPackage
from sambay.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float]

INK = "#1f2933"  # text
QUIET = "#7b8794"  # secondary text, axes
FAINT = "#e4e7eb"  # grids, empty cells
PAPER = "#ffffff"
# Recurrence is warm, attention is cool; within a family lightness differs, and a letter says it
# again, so nothing rests on hue alone (checked for the three common colour deficiencies).
WARM, WARM_LIGHT = "#d1571b", "#f4a83c"
COOL, COOL_MIDDLE, COOL_LIGHT = "#0b4a86", "#4c95d0", "#a9d3f2"

_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "svg.hashsalt": "sambay",
}
_METADATA = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of the given size in inches on white paper.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackage("matplotlib", "drawing pictures", "train") from error
    for name, value in _RC.items():
        matplotlib.rcParams[name] = value
    return Figure(figsize=(width, height), facecolor=PAPER)


def save(figure: Figure, path: Path, *, dots_per_inch: int = 200) -> Path:
    """Write the figure as PNG or SVG, chosen by the suffix of `path`; returns `path`.

    Raises:
        ConfigError: another suffix.
        WriteFailed: the file could not be written.
    """
    if path.suffix not in _METADATA:
        raise ConfigError(f"{path}: pictures are written as .png or .svg; choose one of these")
    content = io.BytesIO()
    figure.savefig(
        content, format=path.suffix[1:], dpi=dots_per_inch, metadata=_METADATA[path.suffix]
    )
    with atomic_write(path) as file:
        file.write(content.getvalue())
    return path


def chart(figure: Figure, rows: int, columns: int, index: int) -> Axes:
    """One of `rows` x `columns` axes in the project's style: light grid, no frame."""
    axes = figure.add_subplot(rows, columns, index)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=3, labelsize=9)
    return axes


def legend(figure: Figure, styles: Mapping[str, tuple[str, str]]) -> None:
    """Put names with their colour and marker in one row at the top left."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=marker, linewidth=2, markeredgecolor=PAPER, label=name)
        for name, (colour, marker) in styles.items()
    ]
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.01, 0.995), ncols=len(handles),
        frameon=False, fontsize=10,
    )  # fmt: skip


def text_width(content: str, size: float) -> float:
    """The width in inches of text of `size` points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    outline = TextPath((0, 0), content, size=size, prop=FontProperties(family="DejaVu Sans"))
    return outline.get_extents().width / 72


class Canvas:
    """A figure whose coordinates are inches from the lower left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = new_figure(width, height)
        self.width, self.height = width, height
        self._axes = self.figure.add_axes((0.0, 0.0, 1.0, 1.0))
        self._axes.set_xlim(0, width)
        self._axes.set_ylim(0, height)
        self._axes.axis("off")

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: str,
        edge: str = "none",
        radius: float = 0.06,
        alpha: float = 1.0,
        line_width: float = 1.0,
    ) -> None:
        """A rectangle with rounded corners; (x, y) is its lower left corner."""
        from matplotlib.patches import FancyBboxPatch

        style = f"round,pad=0,rounding_size={min(radius, width / 2, height / 2)}"
        self._axes.add_patch(
            FancyBboxPatch(
                (x, y), width, height, boxstyle=style, facecolor=fill, edgecolor=edge,
                linewidth=line_width, alpha=alpha,
            )
        )  # fmt: skip

    def text(
        self,
        x: float,
        y: float,
        content: str,
        *,
        size: float = 9,
        colour: str = INK,
        align: str = "center",
        bold: bool = False,
        mono: bool = False,
    ) -> None:
        """Text of `size` points anchored at (x, y)."""
        self._axes.text(
            x, y, content, fontsize=size, color=colour, ha=align, va="center",
            fontweight="bold" if bold else "normal",
            family="DejaVu Sans Mono" if mono else "DejaVu Sans",
        )  # fmt: skip

    def route(
        self,
        points: Sequence[Point],
        *,
        colour: str,
        line_width: float = 2.0,
        radius: float = 0.12,
        arrow: bool = False,
    ) -> None:
        """A line through axis-parallel `points` with rounded corners and, if asked, an arrow."""
        from matplotlib.patches import FancyArrowPatch, PathPatch
        from matplotlib.path import Path as Outline

        vertices, codes = [points[0]], [Outline.MOVETO]
        for before, corner, after in zip(points, points[1:], points[2:], strict=False):
            vertices += [_towards(corner, before, radius), corner, _towards(corner, after, radius)]
            codes += [Outline.LINETO, Outline.CURVE3, Outline.CURVE3]
        end = _towards(points[-1], points[-2], 0.08) if arrow else points[-1]
        outline = Outline([*vertices, end], [*codes, Outline.LINETO])
        self._axes.add_patch(
            PathPatch(outline, fill=False, edgecolor=colour, linewidth=line_width, capstyle="round")
        )
        if arrow:
            head = FancyArrowPatch(
                _towards(points[-1], points[-2], 0.12), points[-1], arrowstyle="-|>",
                mutation_scale=6.5 * line_width, color=colour, linewidth=0, shrinkA=0, shrinkB=0,
            )  # fmt: skip
            self._axes.add_patch(head)

    def save(self, path: Path) -> Path:
        """Write the drawing as PNG or SVG."""
        return save(self.figure, path)


def _towards(start: Point, goal: Point, distance: float) -> Point:
    dx, dy = goal[0] - start[0], goal[1] - start[1]
    length = max(abs(dx), abs(dy)) or 1.0
    step = min(distance, length / 2) / length
    return start[0] + dx * step, start[1] + dy * step
