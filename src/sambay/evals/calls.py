"""What is asked of a model under evaluation, and what it answers, whoever computes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sambay.generate.requests import FinishReason
from sambay.generate.sampling import GREEDY, SamplingParams


@dataclass(frozen=True)
class Call:
    """One text to continue.

    prompt: plain text, never a control token; nothing is put in front of it.
    max_new_tokens: most tokens to produce; the model's end-of-text tokens end it sooner.
    stop: texts that end the continuation and do not belong to it.
    chat: the prompt is a user's turn, to be written as the model's chat template says.
    """

    prompt: str
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    sampling: SamplingParams = GREEDY
    chat: bool = False


@dataclass(frozen=True)
class Answer:
    """A continuation; `num_tokens` counts what was produced, the token that ended it included."""

    text: str
    num_tokens: int
    finish_reason: FinishReason


@dataclass(frozen=True)
class Passage:
    """Token ids whose probability is asked for, behind others that only lead up to them."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """The log-probability of a continuation in nats; whether greedy decoding would produce it."""

    logprob: float
    is_greedy: bool


class Backend(Protocol):
    """A model that answers calls and scores passages.

    facts: which model computed by what, JSON-ready and the same in every run: name, backend, a hash
        of configuration and weights, tokenizer hash, dtype.
    max_context: most tokens of prompt and continuation together; None where nothing limits them.
    prefix_id: the token that stands for the beginning of a text.
    """

    facts: dict[str, Any]
    max_context: int | None
    prefix_id: int

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing added."""
        ...

    def prompt_length(self, call: Call) -> int:
        """The tokens of a call's prompt as the model will see it, chat template included."""
        ...

    def generate(self, calls: Sequence[Call], on_answer: Callable[[int, Answer], None]) -> None:
        """Answer every call; `on_answer(index, answer)` as soon as one is complete.

        Raises:
            SambayError: a call that cannot be answered; what was answered before has been told.
        """
        ...

    def score(self, passages: Sequence[Passage], on_score: Callable[[int, Score], None]) -> None:
        """Score every passage; `on_score(index, score)` as soon as one is complete.

        Raises:
            SambayError: a passage that cannot be scored.
        """
        ...
