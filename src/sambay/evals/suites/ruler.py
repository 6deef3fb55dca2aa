"""RULER's needles in a haystack through lm-eval's own task code, at any lengths."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sambay.errors import ConfigError, nearest
from sambay.evals.calls import Backend
from sambay.evals.harness.evaluation import run_tasks
from sambay.evals.harness.library import TaskResult
from sambay.evals.result import Result
from sambay.evals.runner import Progress
from sambay.evals.statistics import Metric, average, mean
from sambay.evals.tasks.niah import ESSAY_TASKS, TASKS, Haystack, Needles, Writer, read_essays
from sambay.evals.tasks.selection import check_whole, chosen

# Their lists of words and rules of sentences are part of the prompts.
_PACKAGES = ("wonderwords", "nltk")


@dataclass(frozen=True)
class RulerSuite:
    """The eight tasks of the paper's table; each asks what it asks in lm-eval when run alone.

    lengths: tokens of a prompt and the room for its answer, as RULER counts them: what leads over
        to the answer comes on top, about 40 tokens.
    tasks: which of them; `average` is reported where all eight are.
    samples: prompts for each task and length.
    essays: a folder of texts (or one file) to hide needles in where RULER takes Paul Graham's
        essays; results are then named `TASK[files]@LENGTH`.
    haystack: "essay", or "noise" for the sentences that niah_single_1 repeats in place of the
        essays; results are then named `TASK[noise]@LENGTH`, and niah_single_2 asks what
        niah_single_1 asks. Needs no network and no nltk data.

    Raises:
        ConfigError: a setting that cannot work.
    """

    name: ClassVar[str] = "ruler"

    lengths: tuple[int, ...] = (32768,)
    tasks: tuple[str, ...] = TASKS
    samples: int = 500
    essays: Path | None = None
    haystack: str = "essay"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", chosen("tasks", self.tasks, TASKS))
        check_whole("samples", self.samples, least=1)
        if not isinstance(self.lengths, tuple | list) or not self.lengths:
            raise ConfigError(f"lengths = {self.lengths!r}; give at least one, such as 32768")
        for length in self.lengths:
            check_whole("lengths", length, least=256)
        if len(set(self.lengths)) < len(self.lengths):
            raise ConfigError(f"lengths = {self.lengths!r} holds one twice; leave one of them out")
        object.__setattr__(self, "lengths", tuple(self.lengths))
        offered = (Haystack.ESSAY, Haystack.NOISE)
        if self.haystack not in offered:
            raise ConfigError(
                f"haystack = '{self.haystack}' is not known{nearest(str(self.haystack), offered)}"
            )
        if self.essays is not None and self.haystack == Haystack.NOISE:
            raise ConfigError("essays: noise needs no texts; leave out essays= or haystack=")

    @property
    def kind(self) -> Haystack:
        """What hides the needles where RULER takes essays."""
        return Haystack.FILES if self.essays is not None else Haystack(self.haystack)

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides what is asked and what counts; the prompts have a fingerprint."""
        return {
            "lengths": list(self.lengths),
            "tasks": list(self.tasks),
            "samples": self.samples,
            "haystack": str(self.kind),
        }

    @property
    def needles(self) -> list[Needles]:
        """The tasks at their lengths."""
        return [Needles(task, length, self.kind) for length in self.lengths for task in self.tasks]

    def evaluate(
        self, backend: Backend, out: Path, *, on_progress: Progress | None = None
    ) -> Result:
        """The result, written to OUT/result.json; see `run_tasks`.

        Raises:
            ConfigError: prompts that do not fit the model's context (before any is asked; nothing
                is ever cut), or a length that has no room for them.
            DataError: essays that cannot be had.
            MissingPackage: lm-eval, or what it needs for RULER, is not installed.
        """
        limit = backend.max_context
        if limit is not None and max(self.lengths) > limit:
            raise ConfigError(
                f"lengths: {max(self.lengths)} tokens, the model's context is {limit}; ask for "
                "shorter prompts, or raise the limit with --max-context if the model can take it"
            )
        words = read_essays(self.essays, out) if self.essays is not None else None
        writer = Writer(backend.encode, self.kind, words)
        if self.kind is Haystack.ESSAY and ESSAY_TASKS & set(self.tasks):
            writer.require_published_essays()
        tasks = {}
        for number, needles in enumerate(self.needles):
            if on_progress is not None:
                on_progress(number, len(self.needles), f"writing the prompts of {needles.name}")
            tasks[needles.name] = writer.write(needles, self.samples)
        return run_tasks(
            self.name,
            self.settings,
            tasks,
            backend,
            out,
            self.summarise,
            on_progress=on_progress,
        )

    def summarise(
        self, found: Mapping[str, TaskResult]
    ) -> tuple[dict[str, Metric], dict[str, Any]]:
        """`TASK@LENGTH`, the share of the numbers asked for that the answer names; `average`."""
        metrics: dict[str, Metric] = {}
        details: dict[str, Any] = {}
        for needles in self.needles:
            samples = found[needles.name].samples
            metrics[needles.name] = mean([sample[str(needles.length)] for sample in samples])
            tokens = [sample["doc"]["length"] for sample in samples]
            details[needles.name] = {
                "version": found[needles.name].version,
                "mean_tokens": sum(tokens) / len(tokens),
                "most_tokens": max(tokens),
            }
        if self.tasks == TASKS:
            kind = "" if self.kind is Haystack.ESSAY else f"[{self.kind}]"
            for length in self.lengths:
                parts = [metrics[one.name] for one in self.needles if one.length == length]
                metrics[f"average{kind}@{length}"] = average(parts)
        versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
        return metrics, {"tasks": details, "packages": versions}
