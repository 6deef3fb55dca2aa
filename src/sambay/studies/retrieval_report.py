"""The retrieval study on a page: losses, accuracies with their errors, pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sambay.evals.phonebook.comparison import draw_lengths, draw_windows
from sambay.evals.result import Result
from sambay.evals.statistics import Metric
from sambay.evals.suites.chains import draw_steps
from sambay.files import atomic_write, write_json
from sambay.plots.canvas import save
from sambay.studies.retrieval_documents import PAIRS

PAGE, NUMBERS = "study.md", "study.json"
Results = Mapping[str, Mapping[str, Result]]
Rows = Mapping[str, Mapping[str, Any]]
_TITLES = {
    "phonebook": "Phone books, by the number of entries",
    "needles": "Needles (RULER, noise for a haystack), by the number of tokens",
    "chains": "Chained assignments, by the number of steps",
}


def write(results: Results, rows: Rows, out: Path) -> list[Path]:
    """Write OUT/study.md, study.json and pictures; their paths.

    Raises:
        WriteFailed: the operating system refused.
        MissingPackage: matplotlib is not installed.
    """
    with atomic_write(out / PAGE) as file:
        file.write(page(results, rows).encode())
    write_json(out / NUMBERS, numbers(results, rows))
    written = [out / PAGE, out / NUMBERS]
    for name, figure in pictures(results, rows).items():
        written += [save(figure, out / f"{name}{suffix}") for suffix in (".png", ".svg")]
    return written


def page(results: Results, rows: Rows) -> str:
    """Every table in Markdown."""
    parts = [_losses(results, rows)]
    for suite, title in _TITLES.items():
        mine = {name: found[suite] for name, found in results.items() if suite in found}
        if mine:
            parts.append(f"{title}, in per cent with one standard error:\n\n{_table(mine)}")
    return "\n\n".join(parts) + "\n"


def numbers(results: Results, rows: Rows) -> dict[str, Any]:
    """Everything that the page shows, with what it comes from."""
    return {
        "runs": {
            name: {
                "row": dict(rows[name]),
                "results": {
                    suite: {
                        "metrics": {key: one.to_json() for key, one in result.metrics.items()},
                        "settings": result.settings,
                        "items_sha256": result.items_sha256,
                        "weights_sha256": result.model["weights_sha256"],
                        "versions": result.versions,
                    }
                    for suite, result in found.items()
                },
            }
            for name, found in results.items()
        }
    }


def pictures(results: Results, rows: Rows) -> dict[str, Any]:
    """Figures by name: one run of each label, that with the first seed."""
    first: dict[str, str] = {}
    for name in sorted(results, key=lambda one: rows[one]["seed"]):
        first.setdefault(rows[name]["architecture"], name)
    chosen = {label: results[name] for label, name in first.items()}
    drawn: dict[str, Any] = {}
    books = {label: found["phonebook"] for label, found in chosen.items() if "phonebook" in found}
    chains = {label: found["chains"] for label, found in chosen.items() if "chains" in found}
    if books:
        drawn["phonebook_length"] = draw_lengths(
            [*books.values()], labels=[*books], published=False
        )
        labels = [_without_window(label) for label in books]
        asked = set.intersection(*(set(one.settings["pairs"]) for one in books.values()))
        drawn["phonebook_window"] = draw_windows(
            [*books.values()],
            pairs=PAIRS[1] if PAIRS[1] in asked else None,  # the longest that was trained on
            labels=labels,
            published=False,
        )
    if chains:
        drawn["chains"] = draw_steps([*chains.values()], labels=[*chains])
    return drawn


def _without_window(label: str) -> str:
    """The curve of a label: models that differ in their window only make one."""
    return label.partition("-w")[0]


def _losses(results: Results, rows: Rows) -> str:
    lines = ["| | window | parameters | tokens | validation loss |", "|---|--:|--:|--:|--:|"]
    for name, found in results.items():
        row = rows[name]
        windows = {result.model.get("window") for result in found.values()}
        window = next((one for one in windows if one is not None), "–")
        loss = row.get("validation_loss")
        lines.append(
            f"| {name} | {window} | {row['parameters']:,} | {row['tokens']:,} | "
            f"{'–' if loss is None else f'{loss:.4f}'} |"
        )
    return "\n".join(lines)


def _table(results: Mapping[str, Result]) -> str:
    names = list(dict.fromkeys(name for result in results.values() for name in result.metrics))
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "--:|" * len(names)]
    for label, result in results.items():
        cells = [_cell(result.metrics.get(name)) for name in names]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(metric: Metric | None) -> str:
    if metric is None:
        return "–"
    error = "" if metric.stderr is None else f" ± {100 * metric.stderr:.1f}"
    return f"{100 * metric.value:.1f}{error}"
