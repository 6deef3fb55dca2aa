"""A backend without a model: what would be asked, how much of it and how long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sambay.errors import ConfigError
from sambay.evals.backends.prompts import Prompts
from sambay.evals.calls import Answer, Call, Passage, Score


class Rehearsal:
    """A backend (`sambay.evals.calls.Backend`) whose every answer is empty.

    prompts: None where a server reads the texts and nobody here can measure them.

    Attributes:
        num_calls, num_passages: what was asked.
        longest_prompt, longest_whole: tokens of the longest prompt, and with what follows it.
    """

    def __init__(self, prompts: Prompts | None, name: str, max_context: int | None) -> None:
        self.facts: dict[str, Any] = {"name": name, "backend": "rehearsal"}
        self.max_context = max_context
        self.prefix_id = -1 if prompts is None else prompts.prefix_id
        self.measures = prompts is not None
        self.num_calls = self.num_passages = self.longest_prompt = self.longest_whole = 0
        self._prompts = prompts

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing added.

        Raises:
            ConfigError: no tokenizer.
        """
        if self._prompts is None:
            raise ConfigError("this suite needs token ids; give --tokenizer")
        return self._prompts.tokenizer.encode(text)

    def prompt_length(self, call: Call) -> int:
        """The tokens of a call's prompt; 0 without a tokenizer."""
        return 0 if self._prompts is None else len(self._prompts.ids(call))

    def generate(self, calls: Sequence[Call], on_answer: Callable[[int, Answer], None]) -> None:
        """Count the calls and answer nothing."""
        for number, call in enumerate(calls):
            length = self.prompt_length(call)
            self._note(length, length + call.max_new_tokens)
            on_answer(number, Answer("", 0, "length"))
        self.num_calls += len(calls)

    def score(self, passages: Sequence[Passage], on_score: Callable[[int, Score], None]) -> None:
        """Count the passages; every one is called unlikely."""
        for number, passage in enumerate(passages):
            length = len(passage.context)
            self._note(length, length + len(passage.continuation))
            on_score(number, Score(-1.0, False))
        self.num_passages += len(passages)

    def _note(self, prompt: int, whole: int) -> None:
        self.longest_prompt = max(self.longest_prompt, prompt)
        self.longest_whole = max(self.longest_whole, whole)
