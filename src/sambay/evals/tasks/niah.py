"""Needles in a haystack as RULER writes them: lm-eval's own tasks, with a backend's tokens.

Five of the eight tasks hide their needles in Paul Graham's essays, which lm-eval downloads, and put
them between sentences as nltk finds them. Other texts, or the sentences that the first task
repeats, can be used in their place; such tasks have another name.
"""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sambay.errors import ConfigError, DataError, SambayError
from sambay.evals.harness import library
from sambay.evals.tasks.texts import read_texts

HUB_ESSAYS = "baber/paul_graham_essays"
# The numbers in a prompt are drawn from Python's own generator, which lm-eval seeds with this.
_SEED = 0
_SENTENCE_END = re.compile(r"(?<=[.!?]) +")

TASKS = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multiquery",
    "niah_multivalue",
)
ESSAY_TASKS = frozenset(TASKS) - {"niah_single_1", "niah_multikey_2", "niah_multikey_3"}


class Haystack(StrEnum):
    """What hides the needles of the tasks that RULER hides in essays.

    ESSAY: Paul Graham's essays, as published; FILES: other texts; NOISE: the sentences that
    niah_single_1 repeats.
    """

    ESSAY = "essay"
    FILES = "files"
    NOISE = "noise"


@dataclass(frozen=True)
class Needles:
    """A task at a length; `label` tells it from the published one where it differs."""

    task: str
    length: int
    haystack: Haystack

    @property
    def label(self) -> str:
        differs = self.task in ESSAY_TASKS and self.haystack is not Haystack.ESSAY
        return f"{self.task}[{self.haystack}]" if differs else self.task

    @property
    def name(self) -> str:
        return f"{self.label}@{self.length}"


class Writer:
    """Writes the tasks of lm-eval for one tokenizer.

    words: of the user's own texts, where these are the haystack.

    Raises:
        MissingPackage: lm-eval, or what it needs for RULER, is not installed.
    """

    def __init__(
        self, encode: Callable[[str], list[int]], haystack: Haystack, words: list[str] | None
    ) -> None:
        self._encode = encode
        self._haystack = haystack
        self._tasks, self._generator = library.import_ruler()
        self._words = words

    def require_published_essays(self) -> None:
        """Load the essays and nltk's sentence finder, from their caches or the network.

        Raises:
            DataError: one of them cannot be had.
        """
        remedy = (
            "give a folder of other texts with essays=FOLDER, use haystack=noise, or leave "
            f"{', '.join(name for name in TASKS if name in ESSAY_TASKS)} out of tasks="
        )
        nltk = self._generator.nltk
        with library.quiet():
            try:
                self._words = self._generator.get_haystack("essay")
            except Exception as error:  # whatever the hub's client raises; it has no common base
                raise DataError(
                    f"the essays '{HUB_ESSAYS}' cannot be loaded from the hub "
                    f"({type(error).__name__}); {remedy}"
                ) from error
            try:
                nltk.data.find("tokenizers/punkt_tab")
            except LookupError as error:
                if not nltk.download("punkt_tab", quiet=True):
                    raise DataError(
                        "nltk's data 'punkt_tab', which divide the essays into sentences, cannot "
                        "be downloaded; copy them to tokenizers/punkt_tab in a folder that the "
                        f"variable NLTK_DATA names, or {remedy}"
                    ) from error

    def write(self, needles: Needles, samples: int) -> Any:
        """The task of lm-eval, with its prompts: what it asks when it is asked for alone.

        Raises:
            ConfigError: a length that has no room for the prompts, or too few words in the essays.
        """
        metric = str(needles.length)
        common = library.module("lm_eval.tasks.ruler.common_utils")
        documents = self._documents(needles, samples)
        return library.load_tasks(
            "ruler",
            [needles.task],
            custom_dataset=lambda **_: documents,
            metric_list=[
                {
                    "metric": metric,
                    "aggregation": common.aggregate_metrics,
                    "higher_is_better": True,
                }
            ],
        )[0]

    def _documents(self, needles: Needles, samples: int) -> Any:
        state = random.getstate()
        random.seed(_SEED)
        try:
            with library.quiet(), self._replaced(samples):
                found = getattr(self._tasks, needles.task)(max_seq_lengths=[needles.length])
        except SambayError:
            raise
        except ValueError as error:  # the generator's word for a length without room
            raise ConfigError(
                f"lengths: {needles.length} tokens have no room for the prompts of "
                f"'{needles.task}'; ask for longer ones"
            ) from error
        finally:
            random.setstate(state)
        if len(found["test"]) < samples:
            raise ConfigError(
                f"lengths: only {len(found['test'])} of {samples} prompts of '{needles.task}' fit "
                f"{needles.length} tokens; ask for longer ones"
            )
        self._check_words(needles)
        return found

    @contextlib.contextmanager
    def _replaced(self, samples: int) -> Iterator[None]:
        """lm-eval's task code with our tokens, our haystack and our number of samples."""
        tasks, generator = self._tasks, self._generator
        generate, find = tasks.generate_samples, tasks.get_haystack
        sentences = generator.cached_sent_tokenize

        def tokenizer(text: str) -> SimpleNamespace:
            return SimpleNamespace(input_ids=self._encode(text))

        def haystack(type_haystack: str) -> Any:
            return self._words if type_haystack == "essay" else find(type_haystack=type_haystack)

        def samples_of(hay: Any, **options: Any) -> Any:
            options["num_samples"] = samples
            if options["type_haystack"] == "essay" and self._haystack is Haystack.NOISE:
                options["type_haystack"] = "repeat"
                hay = find(type_haystack="repeat")
            return generate(hay, **options)

        own = {"get_tokenizer": lambda name: tokenizer, "get_haystack": haystack}
        earlier = {name: getattr(tasks, name) for name in (*own, "generate_samples")}
        try:
            for name, value in {**own, "generate_samples": samples_of}.items():
                setattr(tasks, name, value)
            if self._haystack is not Haystack.ESSAY:
                # Whether nltk has its data must not decide what is asked.
                generator.cached_sent_tokenize = lru_cache(maxsize=8)(_SENTENCE_END.split)
            yield
        finally:
            for name, value in earlier.items():
                setattr(tasks, name, value)
            generator.cached_sent_tokenize = sentences

    def _check_words(self, needles: Needles) -> None:
        """Make sure that own essays fill the prompts, of which each word takes a token at least."""
        if self._haystack is not Haystack.FILES or needles.task not in ESSAY_TASKS:
            return
        assert self._words is not None
        if len(self._words) >= needles.length:
            return
        tokens = len(self._encode(" ".join(self._words)))
        if tokens < needles.length:
            raise ConfigError(
                f"essays: they have {tokens} tokens, prompts of {needles.length} need at least as "
                "many; add texts, or ask for shorter prompts with lengths="
            )


def read_essays(source: Path, out: Path) -> list[str]:
    """The words of the texts in a folder or file, in the order of the files' names.

    Raises:
        DataError: nothing there, or nothing that can be read as text.
    """
    return [word for text in read_texts(source, out) for word in text.split()]
