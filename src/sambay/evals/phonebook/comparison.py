"""Phonebook results beside each other and beside the paper's: against length, window and depth."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sambay.errors import ConfigError
from sambay.evals.phonebook.paper import (
    METRIC,
    TRAINED_PAIRS,
    PublishedPoint,
    published_points,
)
from sambay.evals.result import Result
from sambay.plots.evaluation import EvaluationChart, EvaluationCurve, draw_evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUITE = "phonebook"
# Models that agree in these are one architecture, whatever their windows.
_ARCHITECTURE = ("layer_pattern", "attention_variant", "position", "hidden_size")
# The end of what the names of such models share: "sambay-w" of "sambay-w64" and "sambay-w128".
_BEFORE_WINDOW = re.compile(r"([-_ .]+(w|window|swa))?[-_ .0-9]*$")
_BARS = "bars: the deviation between groups of questions"


@dataclass(frozen=True)
class SweepPoint:
    """One model at one length.

    label: the curve it belongs to, models that differ in their window only.
    window: None for a model without window attention.
    deviation: between the groups of questions, as the paper gives it; None where it does not.
    stderr: the binomial standard error over all questions; None for the paper's.
    """

    label: str
    window: int | None
    pairs: int
    accuracy: float
    deviation: float | None
    stderr: float | None
    is_published: bool


def sweep(
    results: Sequence[Result], *, labels: Sequence[str] | None = None, published: bool = True
) -> list[SweepPoint]:
    """A row for every model and length, then the paper's for the same lengths.

    labels: the curve of each result; by default results whose models differ in their window only
        make one, named after what they share.

    Raises:
        ConfigError: results of another suite, or that asked different questions.
    """
    _check_comparable(results)
    names = labels or _shared_names(results)
    if len(names) != len(results):
        raise ConfigError(f"{len(names)} labels for {len(results)} results; give one for each")
    own = [
        point for result, name in zip(results, names, strict=True) for point in _rows(result, name)
    ]
    lengths = {point.pairs for point in own}
    paper = [_published_row(point) for point in published_points() if point.pairs in lengths]
    return own + paper if published else own


def draw_windows(
    results: Sequence[Result],
    *,
    pairs: int | None = None,
    labels: Sequence[str] | None = None,
    published: bool = True,
) -> Figure:
    """Accuracy against the window at one length, by default the shortest that all results have.

    Models without window attention are lines across.

    Raises:
        ConfigError: as `sweep`, or no such length.
        MissingPackage: matplotlib is not installed.
    """
    rows = sweep(results, labels=labels, published=published)
    common = set.intersection(*(set(result.settings["pairs"]) for result in results))
    if not common or (pairs is not None and pairs not in common):
        asked = "a length" if pairs is None else f"pairs = {pairs}"
        raise ConfigError(f"not every result has {asked} in common; evaluate with the same pairs")
    pairs = min(common) if pairs is None else pairs
    rows = [row for row in rows if row.pairs == pairs]
    windows = {row.window for row in rows if row.window is not None}
    chart = EvaluationChart(
        title=f"Phonebook, {pairs:,} entries",
        x_label="window (tokens)",
        curves=_curves([row for row in rows if row.window is not None], "window"),
        lines=tuple(
            (_with_source(row.label, row.is_published), row.accuracy)
            for row in rows
            if row.window is None
        ),
        x_ticks={window: f"{window:,}" for window in sorted(windows)},
        x_is_logarithmic=True,
    )
    return draw_evaluation(chart, _caption(rows, _BARS))


def draw_lengths(
    results: Sequence[Result], *, labels: Sequence[str] | None = None, published: bool = True
) -> Figure:
    """Accuracy against the entries of a book, a curve for each model and the paper's beside them.

    The paper's are left out where no result has one of its lengths.

    Raises:
        ConfigError: as `sweep`.
        MissingPackage: matplotlib is not installed.
    """
    names = labels or _distinct([_name(result) for result in results])
    rows = sweep(results, labels=names, published=False)
    paper = published_points()
    if published and {row.pairs for row in rows} & {at.pairs for at in paper}:
        # The paper takes each model to longer books with one window only, the best at 32K.
        extrapolated = {(at.model, at.window) for at in paper if at.pairs > TRAINED_PAIRS}
        rows += [_published_row(at) for at in paper if (at.model, at.window) in extrapolated]
    chart = EvaluationChart(
        title="Phonebook by length",
        x_label="entries of the book (1,850 are 32K tokens of Llama 2)",
        curves=_curves(rows, "pairs"),
        x_ticks={pairs: f"{pairs:,}" for pairs in sorted({row.pairs for row in rows})},
        x_is_logarithmic=True,
    )
    return draw_evaluation(chart, _caption(rows, _BARS))


def draw_depths(result: Result) -> Figure:
    """Accuracy against the depth of the entry asked for, a curve for each length.

    Raises:
        ConfigError: not a result of Phonebook.
        MissingPackage: matplotlib is not installed.
    """
    _check_comparable([result])
    curves, counts = [], []
    for pairs, facts in result.details["lengths"].items():
        bins = facts["by_depth"]
        counts += [part["count"] for part in bins]
        ends = [_interval(part["accuracy"], part["count"]) for part in bins]
        curves.append(
            EvaluationCurve(
                f"{int(pairs):,} entries",
                x=[50 * (part["from"] + part["to"]) for part in bins],
                y=[part["accuracy"] for part in bins],
                low=[low for low, _ in ends],
                high=[high for _, high in ends],
            )
        )
    chart = EvaluationChart(
        title=f"Phonebook by depth, {_name(result)}",
        x_label="where in the book the entry lies (per cent from its beginning)",
        curves=curves,
        x_ticks={value: f"{value}" for value in range(0, 101, 25)},
        x_limits=(-2, 102),
    )
    questions = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)}-{max(counts)}"
    return draw_evaluation(
        chart, f"{questions} questions at each point; bars: 68% interval (Wilson)"
    )


def _rows(result: Result, label: str) -> list[SweepPoint]:
    rows = []
    for name, metric in result.metrics.items():
        if name.startswith(METRIC):
            pairs = name.removeprefix(METRIC)
            deviation = result.details["lengths"][pairs]["group_deviation"]
            rows.append(
                SweepPoint(
                    label, result.model.get("window"), int(pairs), metric.value, deviation,
                    metric.stderr, is_published=False,
                )
            )  # fmt: skip
    return rows


def _published_row(point: PublishedPoint) -> SweepPoint:
    return SweepPoint(
        point.model, point.window, point.pairs, point.accuracy, point.deviation, None,
        is_published=True,
    )  # fmt: skip


def _curves(rows: Sequence[SweepPoint], by: str) -> list[EvaluationCurve]:
    """The points of each label and source, ascending in the field `by`."""
    grouped: dict[tuple[str, bool], list[SweepPoint]] = {}
    for row in rows:
        grouped.setdefault((row.label, row.is_published), []).append(row)
    curves = []
    for (label, is_published), points in grouped.items():
        points.sort(key=lambda point: getattr(point, by))
        half = [point.deviation or 0.0 for point in points]
        curves.append(
            EvaluationCurve(
                label,
                x=[getattr(point, by) for point in points],
                y=[point.accuracy for point in points],
                low=[point.accuracy - bar for point, bar in zip(points, half, strict=True)],
                high=[point.accuracy + bar for point, bar in zip(points, half, strict=True)],
                is_published=is_published,
            )
        )
    return curves


def _shared_names(results: Sequence[Result]) -> list[str]:
    """For each result what the names of all models of its architecture begin with."""
    kinds = [_architecture(result) for result in results]
    labels: dict[tuple[Any, ...], str] = {}
    for kind in kinds:
        names = [_name(r) for r, other in zip(results, kinds, strict=True) if other == kind]
        shared = _common_beginning(names)
        if len(set(names)) > 1:
            shared = _BEFORE_WINDOW.sub("", shared)
            shared = shared if len(shared) > 2 else str(kind[0])
        labels[kind] = shared
    distinct = dict(zip(labels, _distinct(list(labels.values())), strict=True))
    return [distinct[kind] for kind in kinds]


def _architecture(result: Result) -> tuple[Any, ...]:
    """What two models share that differ in their window only; its name where nothing is known."""
    if "layer_pattern" not in result.model:
        return (_name(result),)
    return tuple(result.model.get(name) for name in _ARCHITECTURE)


def _common_beginning(names: Sequence[str]) -> str:
    columns = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in columns)


def _name(result: Result) -> str:
    return str(result.model.get("name", "model"))


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, numbered where one occurs again."""
    seen: dict[str, int] = {}
    distinct = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        distinct.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return distinct


def _with_source(label: str, is_published: bool) -> str:
    return f"{label}, paper" if is_published else label


def _caption(rows: Sequence[SweepPoint], bars: str) -> str:
    return f"{bars}; hollow: the paper's" if any(row.is_published for row in rows) else bars


def _check_comparable(results: Sequence[Result]) -> None:
    if not results:
        raise ConfigError("no results to compare; give at least one")
    for result in results:
        if result.suite != _SUITE:
            raise ConfigError(f"a result of '{result.suite}' is not one of {_SUITE}; leave it out")
    first = results[0].settings
    for result in results[1:]:
        for name in first.keys() - {"pairs", "depth_bins"}:
            if first[name] != result.settings.get(name):
                raise ConfigError(
                    f"{name} was {first[name]!r} in one result and "
                    f"{result.settings.get(name)!r} in another; compare results of the same "
                    "questions"
                )


def _interval(share: float, count: int) -> tuple[float, float]:
    """The ends of Wilson's interval of one standard error, which has a width at 0 and 1 too."""
    middle = (share + 1 / (2 * count)) / (1 + 1 / count)
    half = math.sqrt(share * (1 - share) / count + 1 / (4 * count**2)) / (1 + 1 / count)
    return middle - half, middle + half
