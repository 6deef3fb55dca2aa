"""The HTML of a run's summary: one file without references to anything outside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sambay.errors import MissingPackage
from sambay.plots.run_charts import Chart, svg

_STYLE = """
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1f2933; background: #fff;
       max-width: 1180px; margin: 0 auto; padding: 1.6rem 1.2rem 4rem; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.quiet { color: #7b8794; }
.note { background: #fdf3e1; border-left: 4px solid #f4a83c; padding: .4rem .8rem; }
.facts { display: flex; flex-wrap: wrap; gap: 1.6rem 2.4rem; margin: 1.2rem 0; padding: 0; }
.facts div { min-width: 6rem; }
.facts dt, .facts small { color: #7b8794; font-size: .85rem; display: block; }
.facts dd { margin: 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; }
.charts figure { margin: 0; flex: 1 1 430px; max-width: 580px; }
.charts img { width: 100%; }
.wide { overflow: auto; max-height: 34rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #e4e7eb;
         vertical-align: top; }
th { font-weight: 600; color: #52606d; }
.numbers th, .numbers td { text-align: right; white-space: nowrap; }
td { overflow-wrap: anywhere; }
pre { background: #f5f7fa; padding: .8rem; font-size: .82rem; overflow-x: auto; }
"""


@dataclass(frozen=True)
class Fact:
    """A number that matters, exactly and as it is read."""

    name: str
    value: float
    text: str
    remark: str


@dataclass(frozen=True)
class Page:
    """Everything a page says.

    evaluations: names of the columns, and rows of values. starts: of the run, oldest first.
    """

    title: str
    subtitle: str
    facts: Sequence[Fact]
    notes: Sequence[str]
    charts: Sequence[Chart]
    evaluations: tuple[Sequence[str], Sequence[Sequence[float | None]]]
    description: Sequence[tuple[str, str]]
    starts: Sequence[dict[str, Any]]
    configuration: str


def render(page: Page) -> str:
    """The page as HTML; with tables for charts if matplotlib is missing."""
    pictures, notes = _pictures(page.charts), list(page.notes)
    if pictures is None:
        notes.append('install matplotlib for pictures: pip install "sambay[train]"')
        pictures = [_numbers(chart) for chart in page.charts]
    head, rows = page.evaluations
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_safe(page.title)}</title><style>{_STYLE}</style></head><body>",
        f'<h1>{_safe(page.title)}</h1><div class="quiet">{_safe(page.subtitle)}</div>',
        *(f'<p class="note">{_safe(note)}</p>' for note in notes),
        '<dl class="facts">',
        *(_fact(fact) for fact in page.facts),
        "</dl>",
        '<div class="charts">',
        *pictures,
        "</div>",
    ]
    if rows:
        cells = [
            [_number(name, value) for name, value in zip(head, row, strict=True)] for row in rows
        ]
        parts += ["<h2>Evaluations</h2>", _table(map(_heading, head), cells, "numbers")]
    description = [
        [f"<strong>{_safe(name)}</strong>", _safe(text)] for name, text in page.description
    ]
    parts += ["<h2>The run</h2>", _table([], description)]
    if page.starts:
        names = list(dict.fromkeys(name for start in page.starts for name in start))
        starts = [
            [f"<strong>{_safe(name.replace('_', ' '))}</strong>"]
            + [_safe(_plain(start.get(name))) for start in page.starts[-6:]]
            for name in names
        ]
        which = "last 6 of its " if len(page.starts) > 6 else ""
        parts += [f"<h2>Where it ran: {which}{len(page.starts)} starts</h2>", _table([], starts)]
    parts += [
        "<h2>Configuration</h2><details><summary>config.json</summary>",
        f"<pre>{_safe(page.configuration)}</pre></details>",
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _pictures(charts: Sequence[Chart]) -> list[str] | None:
    """The charts as figures; None without matplotlib."""
    try:
        images = [svg(chart) for chart in charts]
    except MissingPackage:
        return None
    return [
        f'<figure><img alt="{_safe(chart.title)} by step" src="data:image/svg+xml;base64,'
        f'{base64.b64encode(image.encode()).decode()}"></figure>'
        for chart, image in zip(charts, images, strict=True)
    ]


def _numbers(chart: Chart, rows: int = 12) -> str:
    """Some values of a chart, evenly spaced over its steps."""
    tables = []
    for series in chart.series:
        if series.style == "thin":
            continue
        last = len(series.steps) - 1
        chosen = sorted({round(number * last / (rows - 1)) for number in range(rows)})
        cells = [
            [_number("step", series.steps[index]), _number("", series.values[index])]
            for index in chosen
        ]
        tables.append(_table(["step", _safe(series.name)], cells, "numbers"))
    unit = f", {_safe(chart.unit)}" if chart.unit else ""
    return f"<section><h2>{_safe(chart.title)}{unit}</h2>{''.join(tables)}</section>"


def _table(head: Iterable[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    cells = "".join(f"<th>{cell}</th>" for cell in head)
    first = f"<thead><tr>{cells}</tr></thead>" if cells else ""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}">{first}<tbody>{body}</tbody></table></div>'


def _fact(fact: Fact) -> str:
    remark = f"<small>{_safe(fact.remark)}</small>" if fact.remark else ""
    data = f'<data value="{fact.value!r}">{_safe(fact.text)}</data>'
    return f"<div><dt>{_safe(fact.name)}</dt><dd>{data}{remark}</dd></div>"


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    is_count = name in ("step", "tokens")
    text = f"{value:,}" if is_count else f"{value:.4f}" if 0.01 < value < 1e4 else f"{value:.4g}"
    return f'<data value="{value!r}">{text}</data>'


def _heading(name: str) -> str:
    text = name.removeprefix("validation").lstrip("_/").replace("_", " ")
    return _safe(text)


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _safe(text: str) -> str:
    return html.escape(text)
