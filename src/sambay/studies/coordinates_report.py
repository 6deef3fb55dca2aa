"""A coordinate check as a table, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sambay.plots.coordinates import Row, draw_coordinates
from sambay.spec import Parametrization
from sambay.studies.coordinates import CheckSettings, Measure, Point, Reading, Sweep
from sambay.studies.names import TITLES
from sambay.studies.probes import LARGEST_ATTENTION_LOGIT
from sambay.studies.slopes import FLAT, expected_slope, slopes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """The readings of one sweep over `points`; `data` says where its batch came from."""

    sweep: Sweep
    settings: CheckSettings
    points: tuple[Point, ...]
    data: str
    readings: tuple[Reading, ...]

    @property
    def parametrizations(self) -> list[Parametrization]:
        """Those that were measured, in order."""
        return list(dict.fromkeys(one.parametrization for one in self.readings))

    @property
    def moments(self) -> list[tuple[Measure, int]]:
        """What tables show: levels before and after training, changes and updates after it."""
        steps = self.settings.steps
        return [
            (Measure.LEVEL, 0),
            (Measure.LEVEL, steps),
            (Measure.CHANGE, steps),
            (Measure.UPDATE, steps),
        ]

    def expected(self, measure: Measure, quantity: str, step: int) -> float | None:
        """The slope that muP++ promises for a large model; None where it promises none."""
        return expected_slope(self.sweep, measure, quantity, step, self.settings.init_scheme)

    def deviations(self, measures: Sequence[Measure]) -> list[tuple[float, str]]:
        """How far the slopes of muP++ are from what is promised, with what they are of."""
        found = []
        for measure, step in self.moments:
            if measure not in measures:
                continue
            of_all = slopes(self.readings, self.sweep, measure, step)
            for quantity, slope in of_all.get(Parametrization.MUP_PLUS_PLUS, {}).items():
                promised = self.expected(measure, quantity, step)
                if promised is not None:
                    off = math.inf if math.isnan(slope) else abs(slope - promised)
                    found.append((off, f"{quantity}, {_moment(measure, step)}"))
        return found


def table(result: SweepResult) -> list[str]:
    """The slopes as two Markdown tables, activations and weights, each followed by a verdict."""
    activations = [moment for moment in result.moments if moment[0] is not Measure.UPDATE]
    weights = [moment for moment in result.moments if moment[0] is Measure.UPDATE]
    steps = result.settings.steps
    return [
        f"slopes of log mean |activation| against log {_size_word(result)}: at the start, "
        f"after {steps} steps, and of its change",
        "",
        *_rows(result, activations),
        "",
        _verdict(result, [Measure.LEVEL, Measure.CHANGE]),
        "",
        f"slopes of log mean |delta W x| after {steps} steps against log {_size_word(result)}",
        "",
        *_rows(result, weights),
        "",
        _verdict(result, [Measure.UPDATE]),
    ]


def _rows(result: SweepResult, moments: Sequence[tuple[Measure, int]]) -> list[str]:
    by_moment = [slopes(result.readings, result.sweep, *moment) for moment in moments]
    which = result.parametrizations
    heads = ["quantity", *(f"{TITLES[one]} {_moment(*at)}" for one in which for at in moments)]
    heads.append("promised for muP++")
    cells = []
    for quantity in by_moment[0][which[0]]:
        promised = [result.expected(measure, quantity, step) for measure, step in moments]
        values = [of_all[one].get(quantity, math.nan) for one in which for of_all in by_moment]
        words = ["-" if one is None else f"{one:g}" for one in promised]
        cells.append([quantity, *map(_number, values), ", ".join(words)])
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [[head.ljust(width) for head, width in zip(heads, widths, strict=True)], rule]
    for row in cells:
        first, *rest = zip(row, widths, strict=True)
        lines.append([first[0].ljust(first[1]), *(word.rjust(width) for word, width in rest)])
    return ["| " + " | ".join(line) + " |" for line in lines]


def _verdict(result: SweepResult, measures: Sequence[Measure]) -> str:
    found = result.deviations(measures)
    if not found:
        return "muP++ was not measured."
    kept = sum(off <= FLAT for off, _ in found)
    worst, name = max(found)
    return (
        f"muP++: {kept} of {len(found)} slopes are within {FLAT:g} of what is promised; "
        f"the farthest is {worst:.2f} off ({name})."
    )


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}".replace("-0.00", "0.00")


def _moment(measure: Measure, step: int) -> str:
    if measure is Measure.LEVEL:
        return "after" if step else "start"
    return measure.value


def _size_word(result: SweepResult) -> str:
    return {
        Sweep.WIDTH: f"width, at depth {result.points[0].depth}",
        Sweep.DEPTH: f"depth, at width {result.points[0].width}",
        Sweep.LADDER: "width, which grows with depth",
    }[result.sweep]


def to_json(result: SweepResult) -> dict[str, Any]:
    """Settings, slopes (with what is promised) and every reading, as plain values."""
    table_of_slopes = [
        {
            "measure": measure.value,
            "step": step,
            "parametrization": parametrization.value,
            "quantity": quantity,
            "slope": None if math.isnan(slope) else slope,
            "promised_for_mup++": result.expected(measure, quantity, step),
        }
        for measure, step in result.moments
        for parametrization, of_all in slopes(result.readings, result.sweep, measure, step).items()
        for quantity, slope in of_all.items()
    ]
    readings = [
        dataclasses.asdict(one) | {"value": one.value if math.isfinite(one.value) else None}
        for one in result.readings
    ]
    return {
        "format_version": FORMAT_VERSION,
        "sweep": result.sweep.value,
        "settings": dataclasses.asdict(result.settings),
        "data": result.data,
        "points": [dataclasses.asdict(point) for point in result.points],
        "slopes": table_of_slopes,
        "readings": readings,
    }


def draw(result: SweepResult) -> Figure:
    """The picture: levels, changes and updates at the end, a column for each parametrisation.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    titles = {
        Measure.LEVEL: "mean |activation|",
        Measure.CHANGE: "mean |its change|",
        Measure.UPDATE: "mean |delta W x|",
    }
    by_depth = result.sweep is Sweep.DEPTH
    sizes = [point.depth if by_depth else point.width for point in result.points]
    steps = result.settings.steps
    which = result.parametrizations
    rows = [
        Row(f"{title}, relative", [_curves(result, one, measure) for one in which])
        for measure, title in titles.items()
    ]
    seeds = len(result.settings.seeds)
    return draw_coordinates(
        sizes,
        [TITLES[one] for one in which],
        rows,
        size_label="depth" if by_depth else "width",
        caption=(
            f"{result.settings.architecture}, {_size_word(result)}; after {steps} steps on one "
            f"batch of {result.data}; {seeds} seed{'s' if seeds > 1 else ''}; the smallest is 1"
        ),
    )


def _curves(
    result: SweepResult, parametrization: Parametrization, measure: Measure
) -> dict[str, list[float]]:
    """The geometric mean over seeds by quantity, at each point in order."""
    logs: dict[str, dict[Point, list[float]]] = {}
    for one in result.readings:
        matches = one.parametrization is parametrization and one.measure is measure
        if (
            matches
            and one.step == result.settings.steps
            and one.quantity != LARGEST_ATTENTION_LOGIT
        ):
            positive = 0 < one.value < math.inf
            at = logs.setdefault(one.quantity, {}).setdefault(Point(one.width, one.depth), [])
            at.append(math.log(one.value) if positive else math.nan)
    return {
        quantity: [math.exp(sum(by[point]) / len(by[point])) for point in result.points]
        for quantity, by in logs.items()
    }
