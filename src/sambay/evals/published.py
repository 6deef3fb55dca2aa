"""The paper's evaluations, to lay one's own beside.

Source: arXiv 2507.06607v3; `published.json` says of each table where it is from.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any


@dataclass(frozen=True)
class PublishedColumn:
    """What a column holds.

    metric: of a suite's result, which measures the same; None where none does.
    unit: "%" for accuracies; perplexity and speed are in their own.
    settings: of the suite that a result must have to belong into this column.
    protocol: further settings with which the suite asks as published.
    """

    name: str
    metric: str | None
    unit: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    protocol: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PublishedRow:
    """What the paper prints for a model, in the order of the columns; None where it has nothing.

    window: of its window attention; None for a model without, or of another family.
    deviations: printed behind the values, between groups of questions; empty where there are none.
    """

    model: str
    window: int | None
    values: tuple[float | None, ...]
    deviations: tuple[float | None, ...] = ()

    @property
    def name(self) -> str:
        """The model with its window."""
        return self.model if self.window is None else f"{self.model}, window {self.window}"


@dataclass(frozen=True)
class PublishedTable:
    """A table, or the points of a figure that are known as numbers.

    suites: those whose results have metrics for its columns.
    protocol: settings of the suite with which it asks as published.
    """

    key: str
    suites: tuple[str, ...]
    source: str
    title: str
    note: str
    protocol: Mapping[str, Any]
    columns: tuple[PublishedColumn, ...]
    rows: tuple[PublishedRow, ...]

    def value(self, model: str, column: str, window: int | None = None) -> float | None:
        """What is printed for a model in a column; `window` where it has several rows.

        Raises:
            KeyError: no such row, or no such column.
        """
        places = [place for place, one in enumerate(self.columns) if one.name == column]
        rows = [row for row in self.rows if row.model == model and window in (None, row.window)]
        if not rows or not places:
            raise KeyError(f"{self.source} has nothing for {model}, {column}")
        return rows[0].values[places[0]]


@cache
def published_tables() -> dict[str, PublishedTable]:
    """The tables by key: tables 1, 2, 4, 5, 8, 9 and the known points of figure 3."""
    text = importlib.resources.files("sambay.evals").joinpath("published.json").read_text("utf-8")
    return {table["key"]: _table(table) for table in json.loads(text)["tables"]}


def tables_of(suite: str) -> list[PublishedTable]:
    """The tables that a suite's results are compared with, the main one first."""
    return [table for table in published_tables().values() if suite in table.suites]


def _table(values: Mapping[str, Any]) -> PublishedTable:
    columns = tuple(PublishedColumn(**column) for column in values["columns"])
    rows = tuple(
        PublishedRow(
            row["model"], row["window"], tuple(row["values"]), tuple(row.get("deviations", ()))
        )
        for row in values["rows"]
    )
    return PublishedTable(
        **{**values, "suites": tuple(values["suites"]), "columns": columns, "rows": rows}
    )
