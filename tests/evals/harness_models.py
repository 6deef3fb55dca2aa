"""A tiny model behind our engine, its twin in lm-eval's class, and a backend that breaks off."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from sambay.data.tokenizer import END_OF_TEXT, Tokenizer, library
from sambay.errors import ConfigError
from sambay.evals.backends.engine import EngineBackend
from sambay.evals.backends.prompts import Prompts
from sambay.evals.calls import Answer, Backend, Call, Passage, Score
from sambay.generate import Engine, TextGenerator
from sambay.model import LanguageModel
from tests.hf.tiny_hf import twin
from tests.tiny import tiny_model

_TEXTS = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. ",
    "Question: what is one and one?\nAnswer: two\nQuestion: which bird sings?\nAnswer: the wren\n",
    "one two three four five six seven eight nine ten eleven twelve, and the rest of them all ",
)


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(_TEXTS, 330)


@functools.cache
def tiny_language_model() -> LanguageModel:
    """The model that all of these compute with."""
    return tiny_model("sambay", dtype=torch.float32, vocab_size=tokenizer().vocab_size)


def engine_backend(max_context: int | None = None) -> EngineBackend:
    """Our engine on the tiny model."""
    ends = frozenset({tokenizer().eos_id})
    prompts = Prompts(tokenizer(), ends, ConfigError("no chat template"))
    generator = TextGenerator(Engine(tiny_language_model()), tokenizer())
    return EngineBackend(generator, prompts, {"name": "tiny"}, max_context=max_context)


def fast_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers' class; with `bos` it begins every text with the end token."""
    inner = library().Tokenizer.from_str(tokenizer().definition)
    if bos:
        inner.post_processor = library().processors.TemplateProcessing(
            single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, tokenizer().eos_id)]
        )
    names = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT} | (
        {"bos_token": END_OF_TEXT} if bos else {}
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="left", **names)


def lm_eval_model(max_length: int, *, bos: bool = False) -> Any:
    """lm-eval's own class on transformers' class with the same weights."""
    from lm_eval.models.huggingface import HFLM

    other = twin(tiny_language_model())
    other.generation_config.eos_token_id = tokenizer().eos_id
    other.generation_config.pad_token_id = tokenizer().eos_id
    return HFLM(
        pretrained=other,  # pyright: ignore[reportArgumentType]
        tokenizer=fast_tokenizer(bos=bos),
        max_length=max_length,
        batch_size=3,
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


class Stopped(Exception):
    """What ended an evaluation early."""


class BreakingOff:
    """A backend that counts what it is asked, and breaks off after `most` answers."""

    def __init__(self, inner: Backend, most: int | None = None) -> None:
        self._inner, self._most = inner, most
        self.facts, self.max_context = inner.facts, inner.max_context
        self.prefix_id = inner.prefix_id
        self.encode, self.prompt_length = inner.encode, inner.prompt_length
        self.calls: list[Call] = []
        self.passages: list[Passage] = []
        self._answered = 0

    def generate(self, calls: Sequence[Call], on_answer: Callable[[int, Answer], None]) -> None:
        self.calls += calls
        self._inner.generate(calls, lambda index, x: self._tell(on_answer, index, x))

    def score(self, passages: Sequence[Passage], on_score: Callable[[int, Score], None]) -> None:
        self.passages += passages
        self._inner.score(passages, lambda index, x: self._tell(on_score, index, x))

    def _tell(self, tell: Callable[[int, Any], None], index: int, given: Any) -> None:
        if self._answered == self._most:
            raise Stopped
        self._answered += 1
        tell(index, given)
