"""The one file that opens lm-eval: its tasks by name, its requests, its metrics.

lm-eval is left to do what its numbers are compared for: texts of tasks, splitting into requests,
metrics and their standard errors. What it prints is kept from the terminal.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sambay.errors import MissingPackage

BOOTSTRAP_ROUNDS = 1000
"""Resamples for the standard error of a metric that is no mean, such as a perplexity. lm-eval's
own number, 100,000, takes minutes for thousands of documents and changes the third digit."""

_LOUD = (
    "lm_eval", "datasets", "huggingface_hub", "httpx", "torchao", "torch.utils._pytree",
)  # fmt: skip

Answerer = Callable[[str, Sequence[tuple[Any, ...]]], list[Any]]
"""Answers requests of one kind ("loglikelihood", "loglikelihood_rolling", "generate_until"), given
by their arguments, in lm-eval's form."""


@dataclass(frozen=True)
class Request:
    """One request of a task: `arguments` as lm-eval gives them to a model of that `kind`."""

    task: str
    document: int
    kind: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class TaskResult:
    """What lm-eval says of a task.

    metrics: by name, the value and its standard error (None: lm-eval has none).
    samples: by document, lm-eval's record with the metrics of that document.
    version: of lm-eval's definition of the task.
    num_available: documents of the whole task, of which `samples` may be the first few.
    """

    metrics: dict[str, tuple[float, float | None]]
    samples: list[dict[str, Any]]
    version: Any
    num_available: int


def module(name: str = "lm_eval") -> Any:
    """A module of lm-eval.

    Raises:
        MissingPackage: lm-eval is not installed.
    """
    try:
        with quiet():
            import lm_eval  # noqa: F401

            return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackage("lm_eval", "this evaluation", "eval") from error


def load_tasks(folder: str, names: Sequence[str], **fields: Any) -> list[Any]:
    """lm-eval's own tasks of these names, from a folder of its task definitions.

    fields: replace fields of the definitions.

    Raises:
        MissingPackage: lm-eval is not installed.
        OSError, ValueError, KeyError: whatever reading the data of a task raises.
    """
    tasks = module("lm_eval.tasks")
    with quiet():
        manager = tasks.TaskManager(
            include_path=str(Path(module().__file__).parent / "tasks" / folder),
            include_defaults=False,
        )
        # Only members of a group can be given other fields than their files say.
        members = [{"task": name, **fields} for name in names]
        loaded = manager.load([{"group": "asked", "task": members}])["tasks"]
    return [loaded[name] for name in names]


def read_rows(files: Sequence[str], is_parquet: bool) -> Any:
    """The rows of JSON lines or parquet files, as lm-eval's tasks take them; asks no network."""
    dataset = module("lm_eval.api.task").datasets.Dataset
    with quiet():
        return (dataset.from_parquet if is_parquet else dataset.from_json)(list(files))


def make_task(config: dict[str, Any]) -> Any:
    """A task from a complete definition, in the words of lm-eval's task files."""
    tasks = module("lm_eval.tasks")
    with quiet():
        manager = tasks.TaskManager(include_defaults=False)
        return manager.load([config])["tasks"][config["task"]]


def build_requests(tasks: Mapping[str, Any], limit: int | None = None) -> list[Request]:
    """All requests of the tasks, in the order in which lm-eval asks them."""
    by_kind: dict[str, list[Request]] = {}
    with quiet():
        for name, task in tasks.items():
            task.set_config("num_fewshot", 0)
            task.build_all_requests(limit=limit)
            for instance in task.instances:
                request = Request(name, instance.doc_id, instance.request_type, instance.args)
                asked = by_kind.setdefault(request.kind, [])
                asked += [request] * instance.repeats
    return [request for requests in by_kind.values() for request in requests]


def evaluate(
    tasks: Mapping[str, Any], answerer: Answerer, limit: int | None = None
) -> dict[str, TaskResult]:
    """lm-eval's results of the tasks, by their names, with the answers of `answerer`."""
    evaluator = module("lm_eval.evaluator")
    # Its processes for resampling would be copies of this one, model included.
    with quiet(), _environment(DISABLE_MULTIPROC="1"):
        found = evaluator.evaluate(
            lm=language_model(answerer),
            task_dict={"tasks": dict(tasks)},
            limit=limit,
            bootstrap_iters=BOOTSTRAP_ROUNDS,
            log_samples=True,
        )
    return {
        name: TaskResult(
            _metrics(found["results"][name]),
            found["samples"][name],
            found["versions"][name],
            found["n-samples"][name]["original"],
        )
        for name in tasks
    }


def language_model(answerer: Answerer) -> Any:
    """A model for lm-eval, also for its own `simple_evaluate`."""
    base = module("lm_eval.api.model").LM

    class AnsweringModel(base):  # pyright: ignore[reportGeneralTypeIssues]
        """Hands every request on, in the order in which lm-eval asks."""

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            return answerer("loglikelihood", [request.args for request in requests])

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[Any]:
            return answerer("loglikelihood_rolling", [request.args for request in requests])

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            return answerer("generate_until", [request.args for request in requests])

    return AnsweringModel()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what lm-eval and its libraries print, log and draw as progress from the terminal."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        # Its progress bars look for the stream when they are made.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def import_ruler() -> tuple[Any, Any]:
    """lm-eval's modules that write RULER's prompts: the tasks, and the generator under them.

    Importing the generator sorts millions of words: it takes up to half a minute.

    Raises:
        MissingPackage: lm-eval, or what it needs for this, is not installed.
    """
    module()
    for package in ("nltk", "wonderwords"):
        if importlib.util.find_spec(package) is None:
            raise MissingPackage(package, "RULER", "eval")
    # Where nltk's data is missing the module downloads it when it is imported, unless it takes
    # itself for a helper of another process. Most of what is asked of it needs no such data.
    with quiet(), _environment(LOCAL_RANK="1"):
        generator = module("lm_eval.tasks.ruler.prepare_niah")
        return module("lm_eval.tasks.ruler.niah_utils"), generator


def _metrics(found: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Values and standard errors from keys such as "acc,none" and "acc_stderr,none"."""
    metrics = {}
    for key, value in found.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = found.get(f"{metric}_stderr,{kind}")
            known = isinstance(stderr, int | float)
            metrics[metric] = (float(value), float(stderr) if known else None)
    return metrics


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    earlier = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in earlier.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
