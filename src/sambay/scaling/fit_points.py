"""The measurements a fit rests on, read from tables and checked before any work."""

from __future__ import annotations

import csv
import dataclasses
import enum
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sambay.errors import DataError, nearest
from sambay.scaling.fit_solver import Array

CONSTANTS = 3  # A, b and C
FEWEST_SIZES = CONSTANTS + 1  # one more, or nothing is left to tell the noise from
_LOSS_COLUMNS = ("validation_loss", "L", "loss")
_WITHOUT_A_LOSS = ("pending", "failed", "unbuildable")

Row = Mapping[str, Any]


class Resource(enum.Enum):
    """The D of L(D), and its column in a table."""

    FLOPS = "flops"
    PAPER_FLOPS = "paper-flops"
    TOKENS = "tokens"
    PARAMETERS = "parameters"

    @property
    def column(self) -> str:
        return self.value.replace("-", "_")


@dataclasses.dataclass(frozen=True)
class Points:
    """Losses of the runs of one architecture; several runs of one size differ in their seed.

    `x` is D (FLOPs, tokens or parameters), `runs` names each run in messages, and `keys` says which
    runs of two architectures belong together (size and seed).
    """

    name: str
    x: tuple[float, ...]
    losses: tuple[float, ...]
    seeds: tuple[int | None, ...]
    runs: tuple[str, ...]
    keys: tuple[tuple[Any, Any], ...]

    @staticmethod
    def of(
        name: str,
        x: Sequence[float],
        losses: Sequence[float],
        seeds: Sequence[int | None] | None = None,
    ) -> Points:
        """Points from plain numbers; without seeds every run has its own D.

        Raises:
            DataError: as `check`.
        """
        if len(x) != len(losses) or (seeds is not None and len(seeds) != len(x)):
            raise DataError(f"{name}: {len(x)} values of D, but {len(losses)} losses or other "
                            "seeds; give one of each per run")  # fmt: skip
        filled = tuple(seeds) if seeds is not None else (None,) * len(x)
        points = Points(
            name, tuple(map(float, x)), tuple(map(float, losses)), filled,
            tuple(_run_name(name, f"D={D:g}", seed) for D, seed in zip(x, filled, strict=True)),
            tuple(zip(map(float, x), filled, strict=True)),
        )  # fmt: skip
        points.check()
        return points

    @property
    def sizes(self) -> Array:
        """The different D in rising order, (n,)."""
        return np.unique(np.array(self.x))

    @property
    def has_seeds(self) -> bool:
        """Whether some size was run more than once."""
        return len(self.sizes) < len(self.x)

    def check(self) -> None:
        """Refuse what no curve can be fitted to.

        Raises:
            DataError: a loss or D that is not finite, D <= 0, two runs of the same D and seed,
                fewer than four sizes, or losses that do not fall with D.
        """
        for run, D, loss in zip(self.runs, self.x, self.losses, strict=True):
            if not math.isfinite(loss) or loss <= 0:
                raise DataError(f"{run}: its loss is {loss:g}; train it again, or fit the others "
                                f"with --leave-out {run}")  # fmt: skip
            if not math.isfinite(D) or D <= 0:
                raise DataError(f"{run}: D is {D:g}; a power law needs D > 0")
        for (D, seed), count in Counter(zip(self.x, self.seeds, strict=True)).items():
            if count > 1:
                what = "without seeds" if seed is None else f"with seed {seed}"
                raise DataError(f"{self.name}: {count} runs of D={D:g} {what}; give each its own "
                                "seed, or leave repeated runs out")  # fmt: skip
        missing = FEWEST_SIZES - len(self.sizes)
        if missing > 0:
            raise DataError(
                f"{self.name}: {len(self.sizes)} different D, but three constants and their "
                f"uncertainty need at least {FEWEST_SIZES}; train {missing} more "
                f"size{'s' if missing > 1 else ''}"
            )
        if np.polyfit(np.log(self.x), self.losses, 1)[0] >= 0:
            raise DataError(f"{self.name}: the losses do not fall as D grows, so L = A D^-b + C "
                            "does not describe them; look at the runs")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Table:
    """The points of every architecture of a file, and the runs that are not among them, and why."""

    points: tuple[Points, ...]
    left_out: tuple[str, ...]


def read_points(path: Path, resource: Resource, leave_out: Sequence[str] = ()) -> Table:
    """The points of every architecture of a table, in the table's order.

    The table is the ladder's `table.json`, or JSON or CSV rows with the columns D and L and, if
    there is more than one curve or run per size, `architecture` and `seed`. Runs that have not
    finished or cannot be built are left out; one that diverged must be left out by name, because
    the curve without it is a choice.

    Args:
        leave_out: names of runs, or `ARCHITECTURE-d8` for all seeds of a size.

    Raises:
        DataError: the file cannot be read, a column is missing, the runs saw different data, or as
            `Points.check`.
    """
    rows = _read_rows(path)
    rows, left_out = _leave_out(path, rows, leave_out)
    if not rows:
        raise DataError(f"{path}: no finished runs in this table; train some first")
    _check_same_data(path, rows)
    loss_column = _column(path, rows, _LOSS_COLUMNS)
    x_column = "D" if "D" in rows[0] else resource.column
    _column(path, rows, (x_column,))
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(str(row.get("architecture") or path.stem), []).append(row)
    points = [_points(path, name, own, x_column, loss_column) for name, own in grouped.items()]
    return Table(tuple(points), tuple(left_out))


def choose(points: Sequence[Points], name: str) -> Points:
    """The points of one architecture.

    Raises:
        DataError: the table has no such architecture.
    """
    for each in points:
        if each.name == name:
            return each
    raise DataError(f"no runs of '{name}' in the table{nearest(name, [p.name for p in points])}")


def _points(path: Path, name: str, rows: list[Row], x_column: str, loss_column: str) -> Points:
    seeds = tuple(None if row.get("seed") in (None, "") else _seed(path, row) for row in rows)
    x = tuple(_number(path, row, x_column) for row in rows)
    sizes = [row.get("depth") or D for row, D in zip(rows, x, strict=True)]
    words = [f"depth {row['depth']}" if row.get("depth") else f"D={D:g}"
             for row, D in zip(rows, x, strict=True)]  # fmt: skip
    points = Points(
        name, x, tuple(_number(path, row, loss_column) for row in rows), seeds,
        tuple(
            str(row.get("name") or _run_name(name, word, seed))
            for row, word, seed in zip(rows, words, seeds, strict=True)
        ),
        tuple(zip(sizes, seeds, strict=True)),
    )  # fmt: skip
    points.check()
    return points


def _run_name(name: str, size: str, seed: int | None) -> str:
    return f"{name} {size}" + ("" if seed is None else f" seed {seed}")


def _read_rows(path: Path) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".csv":
            return list(csv.DictReader(text.splitlines()))
        content = json.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); give a JSON or CSV table") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: is not JSON ({error}); a CSV table must end in .csv") from error
    rows = content.get("runs") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected a list of runs, or 'runs' with one, as a ladder's "
                        "table.json has")  # fmt: skip
    return rows


def _leave_out(
    path: Path, rows: Sequence[Row], names: Sequence[str]
) -> tuple[list[Row], list[str]]:
    """The rows that count, and a line for each of the others."""
    kept: list[Row] = []
    left_out: list[str] = []
    used: set[str] = set()
    for row in rows:
        run, size = row.get("name"), f"{row.get('architecture')}-d{row.get('depth')}"
        asked = {run, size} & set(names)
        used |= asked
        if asked:
            left_out.append(f"{run or size}: left out as asked")
        elif row.get("state") in _WITHOUT_A_LOSS:
            reason = f", {row['reason']}" if row.get("reason") else ""
            left_out.append(f"{run or size}: {row['state']}{reason}")
        else:
            kept.append(row)
    if unknown := sorted(set(names) - used):
        known = [str(row.get("name")) for row in rows if row.get("name")]
        raise DataError(f"{path}: no run '{unknown[0]}' to leave out{nearest(unknown[0], known)}")
    return kept, left_out


def _check_same_data(path: Path, rows: Sequence[Row]) -> None:
    """Losses on different text cannot lie on one curve, nor runs of one seed in another order."""
    _check_equal(path, [(row, _facts(row.get("data"))) for row in rows if row.get("data")])
    by_seed: dict[Any, list[tuple[Row, dict[str, Any]]]] = {}
    for row in rows:
        if "order_seed" in row:
            order = {"order_seed": row["order_seed"]}
            by_seed.setdefault(row.get("seed"), []).append((row, order))
    for of_one_seed in by_seed.values():
        _check_equal(path, of_one_seed)


def _facts(data: Any) -> dict[str, Any]:
    return dict(data) if isinstance(data, dict) else {"data": data}


def _check_equal(path: Path, facts: Sequence[tuple[Row, dict[str, Any]]]) -> None:
    for row, own in facts[1:]:
        first, expected = facts[0]
        for field in sorted(own.keys() | expected.keys()):
            if own.get(field) != expected.get(field):
                raise DataError(
                    f"{path}: the runs saw different data: {field} is {expected.get(field)!r} in "
                    f"{_label(first)} and {own.get(field)!r} in {_label(row)}; fit runs that agree"
                )


def _label(row: Row) -> str:
    return str(row.get("name") or row.get("architecture") or "one row")


def _column(path: Path, rows: Sequence[Row], names: Sequence[str]) -> str:
    for name in names:
        if all(name in row for row in rows):
            return name
    known = sorted({name for row in rows for name in row})
    raise DataError(f"{path}: not every row has a column '{names[0]}'; the table has "
                    f"{', '.join(known)}")  # fmt: skip


def _number(path: Path, row: Row, column: str) -> float:
    """A table writes a loss that is not finite as null or as a word; the check names the run."""
    value = row[column]
    try:
        return math.nan if value is None else float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: '{column}' is {value!r}, which is not a number") from error


def _seed(path: Path, row: Row) -> int:
    try:
        return int(row["seed"])
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: seed is {row['seed']!r}; it must be a whole number") from error
