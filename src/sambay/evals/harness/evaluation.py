"""Tasks of lm-eval from start to result: checked before anything is asked, resumed when killed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sambay.evals.calls import Backend
from sambay.evals.harness import library
from sambay.evals.harness.answers import Answers, Question
from sambay.evals.harness.library import Request, TaskResult
from sambay.evals.harness.questions import DEFAULT_WINDOW
from sambay.evals.journal import Journal
from sambay.evals.result import Result, sha256_of_json
from sambay.evals.runner import Progress
from sambay.evals.statistics import Metric
from sambay.files import atomic_write

DOCUMENTS = "documents.jsonl"

Summary = Callable[[dict[str, TaskResult]], tuple[dict[str, Metric], dict[str, Any]]]
"""The metrics and details of a result, from what lm-eval says of the tasks."""


def run_tasks(
    suite: str,
    settings: dict[str, Any],
    tasks: Mapping[str, Any],
    backend: Backend,
    out: Path,
    summarise: Summary,
    *,
    limit: int | None = None,
    window: int = DEFAULT_WINDOW,
    bos: bool = False,
    on_progress: Progress | None = None,
) -> Result:
    """The result of lm-eval's tasks, written to OUT/result.json.

    Beside it, samples.jsonl has every answer and documents.jsonl every document's metrics. May be
    interrupted at any time and called again.

    limit: only the first documents of each task.

    Raises:
        ConfigError: a request that does not fit the model's context (before any is asked), or OUT
            holds another evaluation.
        SambayError: what the backend raises.
    """
    requests = library.build_requests(tasks, limit)
    asked = Answers(backend, window=window, bos=bos)
    questions = _questions(asked, requests)
    digest = sha256_of_json(
        [
            [request.task, request.document, question.keys]
            for request, question in zip(requests, questions, strict=True)
        ]
    )
    identity = {
        "suite": suite,
        "settings": settings,
        "items_sha256": digest,
        "model": backend.facts,
    }
    with Journal(out, identity) as journal:
        asked.records = journal
        asked.ask(questions, on_progress)
        found = library.evaluate(tasks, asked, limit)
        _write_documents(out / DOCUMENTS, found)
        metrics, details = summarise(found)
        result = Result(suite, settings, digest, backend.facts, metrics, details)
        result.write(out)
    return result


def _questions(asked: Answers, requests: Sequence[Request]) -> list[Question]:
    """The questions in the order of the requests, which come kind by kind."""
    found: list[Question] = []
    for kind in dict.fromkeys(request.kind for request in requests):
        same = [request for request in requests if request.kind == kind]
        places = [{"task": request.task, "document": request.document} for request in same]
        found += asked.questions(kind, [request.arguments for request in same], places)
    return found


def _write_documents(path: Path, found: Mapping[str, TaskResult]) -> None:
    """One line for each document with its metrics; lm-eval's fingerprint says which it was."""
    with atomic_write(path) as file:
        for task, result in found.items():
            for sample in result.samples:
                line = {
                    "task": task,
                    "document": sample["doc_id"],
                    "sha256": sample["doc_hash"],
                    **{name: sample[name] for name in sample["metrics"]},
                }
                # Metrics may be numbers of numpy.
                text = json.dumps(line, ensure_ascii=False, default=float)
                file.write(text.encode() + b"\n")
