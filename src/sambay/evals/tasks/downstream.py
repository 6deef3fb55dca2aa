"""The zero-shot tasks: where lm-eval defines them, what their data hold, where local copies lie."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sambay.errors import DataError, SambayError
from sambay.evals.harness import library

_SUFFIXES = (".jsonl", ".parquet")


@dataclass(frozen=True)
class DownstreamTask:
    """A task of lm-eval.

    folder: where lm-eval's definition is, below its tasks.
    hub: the data set on the hub that the definition names.
    split: the part of it that is asked.
    fields: what each row of that part has.
    metric: the one that the paper reports.
    """

    folder: str
    hub: str
    split: str
    fields: tuple[str, ...]
    metric: str

    @property
    def is_accuracy(self) -> bool:
        return self.metric.startswith("acc")


_ARC = ("question", "choices", "answerKey")

TASKS = {
    "wikitext": DownstreamTask(
        "wikitext", "EleutherAI/wikitext_document_level", "test", ("page",), "word_perplexity"
    ),
    "lambada_openai": DownstreamTask(
        "lambada", "EleutherAI/lambada_openai", "test", ("text",), "acc"
    ),
    "arc_challenge": DownstreamTask("arc", "allenai/ai2_arc", "test", _ARC, "acc_norm"),
    "arc_easy": DownstreamTask("arc", "allenai/ai2_arc", "test", _ARC, "acc"),
    "hellaswag": DownstreamTask(
        "hellaswag",
        "Rowan/hellaswag",
        "validation",
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        "acc_norm",
    ),
    "piqa": DownstreamTask(
        "piqa", "baber/piqa", "validation", ("goal", "sol1", "sol2", "label"), "acc"
    ),
    "winogrande": DownstreamTask(
        "winogrande",
        "allenai/winogrande",
        "validation",
        ("sentence", "option1", "option2", "answer"),
        "acc",
    ),
}


def load(name: str, data: Path | None) -> Any:
    """A task of lm-eval with its data: from the hub, or from a folder and nowhere else.

    Raises:
        DataError: the data are missing or cannot be used.
        MissingPackage: lm-eval is not installed.
    """
    task = TASKS[name]
    if data is None:
        try:
            return library.load_tasks(task.folder, [name])[0]
        except SambayError:
            raise
        except Exception as error:  # whatever the hub's client raises; it has no common base
            raise DataError(
                f"task '{name}': its data '{task.hub}' cannot be loaded from the hub "
                f"({_first_line(error)}); with data=FOLDER they are read from "
                f"FOLDER/{name}.jsonl, FOLDER/{name}.parquet or files "
                f"FOLDER/{name}/{task.split}*"
            ) from error
    files = find_files(name, data)
    if files[0].suffix == ".jsonl":
        _check_rows(files[0], task.fields)
    try:
        rows = library.read_rows([str(file) for file in files], files[0].suffix == ".parquet")
        return library.load_tasks(
            task.folder,
            [name],
            custom_dataset=lambda **_: {task.split: rows},
            # Only what is asked is needed: examples come from no other split either.
            training_split=None,
            validation_split=task.split if task.split == "validation" else None,
            test_split=task.split if task.split == "test" else None,
        )[0]
    except SambayError:
        raise
    except Exception as error:  # damaged files raise errors of several libraries
        raise DataError(
            f"task '{name}': {files[0]} cannot be used ({_first_line(error)}); every row needs "
            f"the fields {', '.join(task.fields)} as on the hub in '{task.hub}'"
        ) from error


def find_files(name: str, data: Path) -> list[Path]:
    """The files with the rows of a task, all of one kind, in the order of their names.

    Raises:
        DataError: there are none, or several kinds.
    """
    split = TASKS[name].split
    single = [data / f"{name}{suffix}" for suffix in _SUFFIXES]
    found = [file for file in single if file.is_file()]
    if not found:
        found = sorted(
            file
            for file in (data / name).rglob(f"{split}*")
            if file.suffix in _SUFFIXES and file.is_file()
        )
    if not found:
        raise DataError(
            f"task '{name}': neither {single[0]} nor {single[1]} nor a .jsonl or .parquet file "
            f"{data / name}/{split}* exists; put its data there, or leave the task out of tasks="
        )
    if len({file.suffix for file in found}) > 1:
        raise DataError(
            f"task '{name}': both .jsonl and .parquet files, such as {found[0]}, hold its data; "
            "leave one kind there"
        )
    return found


def _check_rows(file: Path, fields: tuple[str, ...]) -> None:
    """Look at the first row: a missing field is told by name."""
    try:
        with file.open(encoding="utf-8") as lines:
            row = json.loads(next(lines, ""))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file}, line 1 is not a JSON object ({error}); write one a line"
        ) from error
    missing = [field for field in fields if not isinstance(row, dict) or field not in row]
    if missing:
        raise DataError(
            f"{file}, line 1 has no field '{missing[0]}'; every row needs {', '.join(fields)}"
        )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
