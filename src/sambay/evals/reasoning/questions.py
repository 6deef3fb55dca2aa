"""Questions with checked answers: the published benchmarks, or a file of anybody's own."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sambay.errors import DataError, SambayError
from sambay.evals.harness import library
from sambay.evals.judge import LETTERS, final_answer

_MATHEMATICS = "Please reason step by step, and put your final answer within \\boxed{}."
_CHOICE = (
    "Please reason step by step, and put your final choice of one letter from A/B/C/D within "
    "\\boxed{}."
)
_WRONG = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".parquet")


@dataclass(frozen=True)
class Benchmark:
    """Where questions are from, and how they are asked in the published evaluation.

    hub, subset, split: of the data set on the hub; empty for one's own.
    samples: answers to each question.
    question_fields, answer_fields: the first that a row has is taken.
    is_choice: the answer is one letter of four options.
    """

    hub: str
    subset: str
    split: str
    samples: int
    question_fields: tuple[str, ...] = ("problem",)
    answer_fields: tuple[str, ...] = ("answer",)
    is_choice: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that a row needs."""
        needed = (self.question_fields[0], self.answer_fields[0])
        return (*needed, *_WRONG) if self.is_choice else needed


OWN = "own"
BENCHMARKS = {
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "default", "train", 64),
    "aime25": Benchmark("yentinglin/aime_2025", "default", "train", 64),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "default", "test", 8),
    "gpqa": Benchmark(
        "Idavidrein/gpqa", "gpqa_diamond", "train", 8, ("Question",), ("Correct Answer",), True
    ),
    OWN: Benchmark(
        "", "default", "", 1,
        ("question", "problem", "Question", "Problem", "prompt"),
        ("answer", "solution", "Answer", "Solution", "final_answer"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """What is asked, instruction included, and the answer: mathematics, or a letter."""

    prompt: str
    answer: str


def read_questions(
    name: str,
    data: Path | None,
    *,
    question_field: str | None = None,
    answer_field: str | None = None,
    seed: int,
) -> list[Question]:
    """The questions of a benchmark in the order of its data.

    data: a file or folder to take them from; None: the hub.
    seed: decides, with each question, at which place its right option stands.

    Raises:
        DataError: no such data, or a row without what is needed (names it and the field).
        MissingPackage: the hub, or parquet, without lm-eval.
    """
    benchmark = BENCHMARKS[name]
    questions = [question_field] if question_field else benchmark.question_fields
    answers = [answer_field] if answer_field else benchmark.answer_fields
    source = str(data) if data is not None else benchmark.hub
    found = []
    for number, row in enumerate(_rows(name, benchmark, data)):
        place = f"{source}, question {number}"
        text = _field(row, questions, place)
        answer = _field(row, answers, place)
        if benchmark.is_choice:
            options = [_field(row, [field], place) for field in _WRONG]
            found.append(_choice(text, answer, options, seed))
        else:
            answer = final_answer(answer)
            if not answer:
                raise DataError(f"{place} has no answer behind '####'; write one, or leave it out")
            found.append(Question(f"{_MATHEMATICS} {text}", answer))
    if not found:
        raise DataError(f"{source} holds no questions; give a file with one JSON object a line")
    return found


def question_seed(seed: int, text: str) -> int:
    """A seed for all that is drawn for one question, whatever stands before it."""
    digest = hashlib.blake2b(f"{seed}/{text}".encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1


def _choice(text: str, answer: str, options: list[str], seed: int) -> Question:
    place = question_seed(seed, text) % len(LETTERS)
    options.insert(place, answer)
    lines = [f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=True)]
    return Question(f"{_CHOICE} {text}\n\n" + "\n".join(lines), LETTERS[place])


def _field(row: Any, names: Sequence[str], place: str) -> str:
    """The text of the first of these fields that a row has; numbers as they are written."""
    if not isinstance(row, dict):
        raise DataError(f"{place} is no JSON object; write one a line, with a field '{names[0]}'")
    for name in names:
        value = row.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, str) and value.strip():
            return value
        if name in row:
            raise DataError(f"{place}: field '{name}' is {value!r}; it must be a text or a number")
    wanted = " or ".join(f"'{name}'" for name in names)
    raise DataError(
        f"{place} has no field {wanted} (it has {', '.join(map(repr, row))}); name the right one "
        "with question_field= or answer_field="
    )


def _rows(name: str, benchmark: Benchmark, data: Path | None) -> Iterable[Any]:
    if data is None:
        return _from_hub(name, benchmark)
    files = [data] if data.is_file() else _files(benchmark, data)
    if files[0].suffix == ".parquet":
        paths = [str(file) for file in files]
        return _loaded("parquet", None, "train", {"data_files": {"train": paths}}, str(data))
    read = _csv if files[0].suffix == ".csv" else _json_lines
    return [row for file in files for row in read(file)]


def _files(benchmark: Benchmark, folder: Path) -> list[Path]:
    """The files of a folder, such as a copy of a data set's repository, that hold the questions."""
    if not folder.is_dir():
        raise DataError(f"data = {folder} does not exist; give a .jsonl file, or a folder with one")
    files = sorted(file for file in folder.rglob("*") if file.suffix in _SUFFIXES)
    named = benchmark.split if benchmark.subset == "default" else benchmark.subset
    matching = [file for file in files if file.name.startswith(named)]
    chosen = matching or files
    if not chosen or len({file.suffix for file in chosen}) > 1 or (not matching and len(files) > 1):
        what = "no file" if not chosen else f"several files, such as {chosen[0].name},"
        raise DataError(
            f"data = {folder} has {what} with questions; give the one file itself, .jsonl, .csv "
            "or .parquet"
        )
    return chosen


def _json_lines(file: Path) -> Iterable[Any]:
    try:
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise DataError(
                        f"{file}, line {number} is not JSON ({error}); write one object a line"
                    ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}; check the file") from error


def _csv(file: Path) -> Iterable[dict[str, Any]]:
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            yield from csv.DictReader(lines)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read: {error}; check the file") from error


def _from_hub(name: str, benchmark: Benchmark) -> Iterable[Any]:
    subset = None if benchmark.subset == "default" else benchmark.subset
    remedy = (
        f"; put its questions into a file, one JSON object a line with the fields "
        f"{', '.join(repr(field) for field in benchmark.fields)}, and give benchmark={name} "
        "data=FILE.jsonl"
    )
    return _loaded(benchmark.hub, subset, benchmark.split, {}, benchmark.hub, remedy)


def _loaded(
    path: str, subset: str | None, split: str, options: dict[str, Any], what: str, remedy: str = ""
) -> Iterable[Any]:
    """The rows of a data set, read as lm-eval reads those of its tasks."""
    try:
        task = library.make_task(
            {
                "task": "questions", "dataset_path": path, "dataset_name": subset,
                "dataset_kwargs": options, "test_split": split,
                "output_type": "generate_until", "doc_to_text": "", "doc_to_target": "",
            }
        )  # fmt: skip
        return list(task.dataset[split])
    except SambayError:
        raise
    except Exception as error:  # whatever the hub's client raises; it has no common base
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        raise DataError(f"{what} cannot be loaded ({reason}){remedy or '; check it'}") from error
