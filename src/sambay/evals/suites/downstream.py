"""The zero-shot tasks of the paper's tables through lm-eval: WikiText and six accuracies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sambay.errors import ConfigError
from sambay.evals.calls import Backend
from sambay.evals.harness import library
from sambay.evals.harness.evaluation import run_tasks
from sambay.evals.harness.library import TaskResult
from sambay.evals.harness.questions import DEFAULT_WINDOW
from sambay.evals.result import Result
from sambay.evals.runner import Progress
from sambay.evals.statistics import Metric, average
from sambay.evals.tasks.downstream import TASKS, load
from sambay.evals.tasks.selection import check_whole, chosen

ACCURACIES = tuple(name for name, task in TASKS.items() if task.is_accuracy)


@dataclass(frozen=True)
class DownstreamSuite:
    """lm-eval's own definitions of the tasks, without examples.

    tasks: which of them; `average` is reported where all six accuracies are.
    limit: only the first documents of each task, for a quick look.
    data: a folder with the data, where there is no network:
        DATA/TASK.jsonl or DATA/TASK.parquet, or files below DATA/TASK/ whose names begin with the
        split that is asked, such as validation-00000-of-00001.parquet. Splits and fields are those
        of the data sets on the hub (`sambay.evals.tasks.downstream.TASKS`).
    window: most tokens of WikiText's articles that are read at once; the paper's evaluation: 4096.
    bos: begin every text with the model's token for that, as lm-eval does where a tokenizer adds
        one by itself (Llama 2).

    Raises:
        ConfigError: a setting that cannot work.
    """

    name: ClassVar[str] = "downstream"

    tasks: tuple[str, ...] = tuple(TASKS)
    limit: int | None = None
    data: Path | None = None
    window: int = DEFAULT_WINDOW
    bos: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", chosen("tasks", self.tasks, tuple(TASKS)))
        check_whole("window", self.window, least=2)
        if self.limit is not None:
            check_whole("limit", self.limit, least=1)

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides what is asked and what counts; the data have a fingerprint."""
        return {
            "tasks": list(self.tasks),
            "limit": self.limit,
            "data": "hub" if self.data is None else "files",
            "window": self.window,
            "bos": self.bos,
        }

    def evaluate(
        self, backend: Backend, out: Path, *, on_progress: Progress | None = None
    ) -> Result:
        """The result, written to OUT/result.json; see `run_tasks`.

        Raises:
            DataError: data of a task that are missing or damaged (before anything is asked).
            ConfigError: a text that does not fit the model's context (before anything is asked).
        """
        library.module()
        if self.data is not None and not self.data.is_dir():
            raise ConfigError(f"data = {self.data} is not a folder; give the one with the tasks")
        loaded = {name: load(name, self.data) for name in self.tasks}
        return run_tasks(
            self.name,
            self.settings,
            loaded,
            backend,
            out,
            summarise,
            limit=self.limit,
            window=self.window,
            bos=self.bos,
            on_progress=on_progress,
        )


def summarise(found: Mapping[str, TaskResult]) -> tuple[dict[str, Metric], dict[str, Any]]:
    """`TASK.METRIC` of the metric that the paper reports, `average`, and all of lm-eval's."""
    metrics: dict[str, Metric] = {}
    details: dict[str, Any] = {}
    for name, result in found.items():
        reported, count = TASKS[name].metric, len(result.samples)
        metrics[f"{name}.{reported}"] = Metric(*result.metrics[reported], count)
        details[name] = {
            "version": result.version,
            "documents": count,
            "documents_of_task": result.num_available,
            "metrics": {
                metric: {"value": value, "stderr": stderr}
                for metric, (value, stderr) in result.metrics.items()
            },
        }
    if set(ACCURACIES) <= found.keys():
        metrics["average"] = average(
            [metrics[f"{name}.{TASKS[name].metric}"] for name in ACCURACIES]
        )
    return metrics, {"tasks": details}
