"""The table of a ladder, OUT/table.json and table.md: every run, measured, pending or impossible.

table.json: {"format_version": 1, "runs": [row, ...]}; a row has name, architecture, depth, seed,
state (finished, pending, failed, diverged, unbuildable), the reason where there is one, width,
parameters, parameters_without_embeddings, steps, tokens, flops (of the whole run, every part),
paper_flops (6 N T without attention and embeddings, see `on_one_axis`), validation_loss (nats per
token), validation_bits_per_byte, seconds, place (device, threads, versions), peak_learning_rate,
precision, order_seed, and data: what must agree in all runs.
Imports no torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sambay.errors import DataError
from sambay.files import WriteFailed, atomic_write, write_json
from sambay.scaling.iso import REFERENCE
from sambay.train.display import duration

TABLE, PAGE, LOCK = "table.json", "table.md", ".table.lock"
FORMAT_VERSION = 1
_SORTED_BY = ("architecture", "depth", "seed")
Row = dict[str, Any]


def read_table(out: Path) -> dict[str, Row]:
    """The rows of a ladder's table by name of the run; none if there is no table.

    Raises:
        DataError: the file is damaged or of another version.
    """
    path = out / TABLE
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version, rows = values["format_version"], {row["name"]: row for row in values["runs"]}
        _ = [row[name] for row in rows.values() for name in (*_SORTED_BY, "state", "reason")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is damaged ({error}); remove it, the runs themselves are not in it"
        ) from error
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path}: format_version = {version!r}, this version of sambay reads {FORMAT_VERSION}"
        )
    return rows


def on_one_axis(rows: Mapping[str, Row]) -> dict[str, Row]:
    """The rows with the paper's FLOPs: N and T are the Transformer++'s of the same depth.

    So architectures of one depth stand above each other (arXiv 2507.06607, figure 2, and its
    code). Where the table has no Transformer++ of a depth, N and T are the run's own.
    """
    shared = {
        row["depth"]: _paper_flops(row)
        for row in rows.values()
        if row["architecture"] == REFERENCE and "tokens" in row
    }
    return {
        name: row | {"paper_flops": shared.get(row["depth"], _paper_flops(row))}
        if "tokens" in row
        else row
        for name, row in rows.items()
    }


def _paper_flops(row: Row) -> int:
    return 6 * row["parameters_without_embeddings"] * row["tokens"]


def write_table(out: Path, rows: Mapping[str, Row]) -> None:
    """Write both files of the table, sorted by architecture, depth and seed.

    Raises:
        WriteFailed: the operating system refused.
    """
    ordered = sorted(
        rows.values(), key=lambda row: (row["architecture"], row["depth"], row["seed"])
    )
    write_json(out / TABLE, {"format_version": FORMAT_VERSION, "runs": ordered})
    with atomic_write(out / PAGE) as file:
        file.write(page(ordered).encode())


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the table against other processes that change it.

    Raises:
        WriteFailed: the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / LOCK).open("a")
    except OSError as error:
        raise WriteFailed(
            f"cannot write to {out}: {error.strerror}; choose another --out or correct its "
            "permissions"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def page(rows: Iterable[Row]) -> str:
    """The table in Markdown."""
    rows = list(rows)
    lines = [
        "| architecture | depth | width | seed | parameters | without embeddings | tokens | FLOPs "
        "| validation loss | bits/byte | time | device |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        if row.get("validation_loss") is None:
            continue
        cells = (
            row["architecture"],
            row["depth"],
            row["width"],
            row["seed"],
            f"{row['parameters']:,}",
            f"{row['parameters_without_embeddings']:,}",
            f"{row['tokens']:,}",
            f"{row['flops']:.4g}",
            f"{row['validation_loss']:.4f}",
            f"{row['validation_bits_per_byte']:.4f}",
            duration(row["seconds"]),
            row["place"].get("device", ""),
        )
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    for state, title in (
        ("pending", "Not finished"),
        ("diverged", "Diverged"),
        ("failed", "Failed"),
        ("unbuildable", "Cannot be built"),
    ):
        some = [row for row in rows if row["state"] == state]
        if some:
            lines += ["", f"{title}:", ""]
            lines += [f"- {row['name']}" + _because(row["reason"]) for row in some]
    return "\n".join(lines) + "\n"


def _because(reason: str) -> str:
    return f": {reason}" if reason else ""
