"""Results in tables of Markdown, one's own above the paper's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from sambay.errors import ConfigError
from sambay.evals.published import PublishedColumn, PublishedRow, PublishedTable, tables_of
from sambay.evals.result import Result, sha256_of_json
from sambay.evals.statistics import Metric

# Metrics that are shares; others are shown as they are.
_SHARES = (
    "accuracy", "final_accuracy", "average", "niah_", "pass@", "boxed_pass@", "maj@", "boxed",
    "no_answer", "cut_off",
)  # fmt: skip
_DIGEST = 8  # characters of a fingerprint that are shown


def table(results: Sequence[Result]) -> str:
    """Markdown: for each suite the paper's columns that the results have, then all else they have.

    Values are per cent where they are shares, with one standard error and the number of items.
    Where results of one suite answer different questions, a letter at each value says which.

    Raises:
        ConfigError: no results.
    """
    if not results:
        raise ConfigError("no results to put into a table; give at least one")
    suites = dict.fromkeys(result.suite for result in results)
    names = _model_names(results)
    sections = [
        _Section(suite, [result for result in results if result.suite == suite], names).lines()
        for suite in suites
    ]
    return "\n".join(line for section in sections for line in section)


@dataclass
class _Row:
    """A model's results, by column."""

    model: str
    cells: dict[int, Result] = field(default_factory=dict)


class _Section:
    """The tables of one suite."""

    def __init__(self, suite: str, results: Sequence[Result], names: dict[str, str]) -> None:
        self.suite, self.results, self.names = suite, results, names
        self.tables = tables_of(suite)
        self.columns = [
            column
            for column in (self.tables[0].columns if self.tables else ())
            if any(_metric(result, column) for result in results)
        ]
        digests = list(dict.fromkeys(result.items_sha256 for result in results))
        self.marks = {digest: _letters(number) for number, digest in enumerate(digests)}

    def lines(self) -> Iterator[str]:
        """The section, a heading first and an empty line last."""
        yield from (f"## {self.suite}", "")
        if self.columns:
            yield from self._comparison()
        elif self.tables:
            yield from (f"Nothing here is in {self.tables[0].source}.", "")
        yield from self._everything_else()

    def _comparison(self) -> Iterator[str]:
        rows = self._own_rows()
        marked = {
            place
            for place in range(len(self.columns))
            if len({row.cells[place].items_sha256 for row in rows if place in row.cells}) > 1
        }
        header = [
            f"{column.name} ({column.unit})" if column.unit else column.name
            for column in self.columns
        ]
        body = [
            [f"**{row.model}**", "this evaluation"]
            + [
                self._cell(row.cells[place], column, place in marked) if place in row.cells else ""
                for place, column in enumerate(self.columns)
            ]
            for row in rows
        ]
        used: list[PublishedTable] = []
        seen: set[str] = set()
        for published in self.tables:
            found = [
                (row.name, self._published_cells(published, row))
                for row in published.rows
                if row.name not in seen
            ]
            found = [(name, cells) for name, cells in found if any(cells)]
            seen |= {name for name, _ in found}
            used += [published] if found else []
            where = published.source.rpartition(", ")[2]
            body += [[_escaped(name), where, *cells] for name, cells in found]
        yield from _markdown(["model", "from", *header], body)
        yield ""
        yield (
            "Value ± standard error (items); behind it in brackets the standard deviation between "
            "groups of questions, where there is one."
        )
        yield from ("", *self._notes(used), *self._deviations(rows))
        if marked:
            yield from (self._different(), "")

    def _own_rows(self) -> list[_Row]:
        """A row for each model, and another where it has two results for a column."""
        rows: list[_Row] = []
        for result in self.results:
            places = [place for place, column in enumerate(self.columns) if _metric(result, column)]
            if not places:
                continue
            name = self.names[_model_key(result)]
            row = next(
                (row for row in rows if row.model == name and not row.cells.keys() & set(places)),
                None,
            )
            if row is None:
                row = _Row(name)
                rows.append(row)
            row.cells |= dict.fromkeys(places, result)
        return rows

    def _cell(self, result: Result, column: PublishedColumn, is_marked: bool) -> str:
        metric = _metric(result, column)
        assert metric is not None
        text = _shown(metric, 100.0 if column.unit == "%" else 1.0)
        deviation = _group_deviation(result, column.metric or "")
        if deviation is not None:
            text += f" [{100 * deviation:.2f}]"
        return text + (f" <sup>{self.marks[result.items_sha256]}</sup>" if is_marked else "")

    def _published_cells(self, published: PublishedTable, row: PublishedRow) -> list[str]:
        """What the paper has for our columns; empty where it has nothing."""
        cells = []
        for column in self.columns:
            place = next(
                (
                    place
                    for place, other in enumerate(published.columns)
                    if (other.metric, other.settings) == (column.metric, column.settings)
                ),
                None,
            )
            value = None if place is None else row.values[place]
            text = "" if value is None else f"{value:.2f}"
            deviation = row.deviations[place] if place is not None and row.deviations else None
            cells.append(text if deviation is None else f"{text} [{deviation:.2f}]")
        return cells

    def _notes(self, used: Sequence[PublishedTable]) -> Iterator[str]:
        for published in used:
            yield f"- {published.source}: {published.note}."

    def _deviations(self, rows: Sequence[_Row]) -> Iterator[str]:
        """What each result asked in another way than the paper."""
        for row in rows:
            for result in {id(result): result for result in row.cells.values()}.values():
                protocol = dict(self.tables[0].protocol)
                for place, column in enumerate(self.columns):
                    if row.cells.get(place) is result:
                        protocol |= column.protocol
                changed = [
                    f"{name} = {result.settings[name]} instead of {wanted}"
                    for name, wanted in protocol.items()
                    if name in result.settings and result.settings[name] != wanted
                ]
                which = _escaped(_name_in_suite(row.model, result))
                yield f"- {which}: " + ("; ".join(changed) or "settings as published") + "."
        yield ""

    def _everything_else(self) -> Iterator[str]:
        """Metrics without a column in the paper: a line for each, a column for each result."""
        shown = {
            (id(result), column.metric)
            for result in self.results
            for column in self.columns
            if _metric(result, column)
        }
        names = dict.fromkeys(
            name
            for result in self.results
            for name in result.metrics
            if (id(result), name) not in shown
        )
        if not names:
            return
        results = [
            result
            for result in self.results
            if any((id(result), name) not in shown for name in result.metrics)
        ]
        marked = len({result.items_sha256 for result in results}) > 1
        header = ["metric"]
        for result in results:
            name = _escaped(_name_in_suite(self.names[_model_key(result)], result))
            mark = f" <sup>{self.marks[result.items_sha256]}</sup>" if marked else ""
            header.append(name + mark)
        body = []
        for name in names:
            scale = 100.0 if _is_share(name) else 1.0
            cells = [
                _shown(result.metrics[name], scale)
                if name in result.metrics and (id(result), name) not in shown
                else ""
                for result in results
            ]
            body.append([_escaped(name) + (" (%)" if _is_share(name) else ""), *cells])
        yield from _markdown(header, body)
        yield from ("", "Value ± standard error (items).", "")
        if marked:
            yield from (self._different(), "")

    def _different(self) -> str:
        marks = ", ".join(f"{mark}: {digest[:_DIGEST]}" for digest, mark in self.marks.items())
        return (
            "Letters: these results answer different questions, so they differ by more than the "
            f"models (fingerprints {marks})."
        )


def _metric(result: Result, column: PublishedColumn) -> Metric | None:
    """What a result has for a column of the paper."""
    if column.metric is None:
        return None
    if any(result.settings.get(name) != value for name, value in column.settings.items()):
        return None
    return result.metrics.get(column.metric)


def _group_deviation(result: Result, metric: str) -> float | None:
    """The deviation between groups of questions, where a suite reports it."""
    lengths = result.details.get("lengths")
    facts = lengths.get(metric.partition("@")[2]) if isinstance(lengths, dict) else None
    return facts.get("group_deviation") if isinstance(facts, dict) else None


def _is_share(name: str) -> bool:
    return name.startswith(_SHARES) or ".acc" in name


def _shown(metric: Metric, scale: float) -> str:
    if scale == 1.0:
        error = "" if metric.stderr is None else f" ± {metric.stderr:.3g}"
        return f"{metric.value:.5g}{error} ({metric.count})"
    error = "" if metric.stderr is None else f" ± {scale * metric.stderr:.2f}"
    return f"{scale * metric.value:.2f}{error} ({metric.count})"


def _name_in_suite(model: str, result: Result) -> str:
    benchmark = result.settings.get("benchmark")
    return f"{model}, {benchmark}" if benchmark else model


def _model_key(result: Result) -> str:
    return sha256_of_json(result.model)


def _model_names(results: Sequence[Result]) -> dict[str, str]:
    """A name for each model, with a fingerprint where several share one."""
    names = {_model_key(result): str(result.model.get("name", "model")) for result in results}
    shared = list(names.values())
    return {
        key: _escaped(name if shared.count(name) == 1 else f"{name} ({key[:_DIGEST]})")
        for key, name in names.items()
    }


def _letters(number: int) -> str:
    """a to z, then aa and so on."""
    text = ""
    number += 1
    while number:
        number, rest = divmod(number - 1, 26)
        text = chr(ord("a") + rest) + text
    return text


def _escaped(text: str) -> str:
    """Text that cannot end a cell."""
    return " ".join(text.replace("\\|", "|").replace("|", "\\|").split())


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + " --- |" * len(header)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
