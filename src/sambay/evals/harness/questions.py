"""Requests of lm-eval as passages to score and calls to answer, token for token as its own models.

The reference is lm-eval's `HFLM`, with two differences: nothing is ever cut to fit a context, and
a text that holds the name of a control token is text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sambay.errors import ConfigError, DataError
from sambay.evals.calls import Call, Passage
from sambay.generate.sampling import GREEDY, SamplingParams

DEFAULT_NEW_TOKENS = 256
"""What lm-eval's own models produce at most where a task does not say."""

DEFAULT_WINDOW = 4096
"""The window of the paper's own evaluation."""

_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Reading:
    """How texts become tokens.

    prefix_id: the token in front of a text that nothing leads up to.
    bos: put it in front of every other text too, as lm-eval does for a tokenizer that adds one.
    window: most tokens that a long text is read by at once.
    """

    encode: Encode
    prefix_id: int
    bos: bool
    window: int

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text as a model sees it."""
        return [self.prefix_id, *self.encode(text)] if self.bos else self.encode(text)

    def pair(self, context: str, continuation: str, where: str) -> Passage:
        """A continuation behind its context.

        White space at the end of the context belongs to the continuation, and both are encoded
        together, so that a word is not divided.

        Raises:
            DataError: nothing is left to score.
        """
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        if kept:
            before = self.tokens(kept)
            after = self.tokens(kept + continuation)[len(before) :]
        else:
            before, after = [self.prefix_id], self.encode(continuation)
            if after[:1] == before:
                after = after[1:]
        if not after:
            raise DataError(f"{where}: the continuation {continuation!r} has no token of its own")
        return Passage(tuple(before), tuple(after))

    def windows(self, text: str) -> list[Passage]:
        """A text in pieces that are scored once each, the last one with a full window before it."""
        tokens, size = self.tokens(text), self.window
        pieces = [Passage((self.prefix_id,), tuple(tokens[:size]))] if tokens else []
        for start in range(size, len(tokens), size):
            end = min(start + size, len(tokens))
            context = tokens[end - size - 1 : start]
            pieces.append(Passage(tuple(context), tuple(tokens[start:end])))
        return pieces


def is_drawn(options: dict[str, Any]) -> bool:
    """Whether lm-eval's generation options ask for tokens that are drawn by chance."""
    do_sample = options.get("do_sample")
    if do_sample is None:
        return float(options.get("temperature") or 0.0) > 0
    return bool(do_sample)


def to_call(prompt: str, options: dict[str, Any], seed: int, where: str) -> Call:
    """The call that a request with lm-eval's generation options means.

    Raises:
        ConfigError: an option that our backends do not have, or that cannot work.
    """
    rest = dict(options)
    until = rest.pop("until", None) or []
    limits = [rest.pop(name, None) for name in _LIMITS]
    limit = next((one for one in limits if one is not None), DEFAULT_NEW_TOKENS)
    do_sample = rest.pop("do_sample", None)
    chosen = {name: rest.pop(name) for name in _SAMPLING if rest.get(name) is not None}
    if rest:
        raise ConfigError(
            f"{where}: generation option '{sorted(rest)[0]}' is not known; leave it out of the "
            f"task (known: until, do_sample, {_LIMITS[0]}, {', '.join(_SAMPLING)})"
        )
    temperature = float(chosen.pop("temperature", 0.0))
    if do_sample and temperature == 0:
        raise ConfigError(f"{where}: do_sample needs a temperature above 0; set one in the task")
    sampling = GREEDY
    if is_drawn(options):
        sampling = SamplingParams(temperature=temperature, seed=seed, **chosen)
    elif "repetition_penalty" in chosen:
        sampling = SamplingParams(repetition_penalty=chosen["repetition_penalty"])
    stop = [until] if isinstance(until, str) else list(until)
    return Call(prompt, int(limit), tuple(text for text in stop if text), sampling)


def check_passages(passages: Sequence[Passage], max_context: int | None, where: str) -> None:
    """Make sure that passages fit the model's context.

    Raises:
        ConfigError: one does not; nothing is ever cut.
    """
    for passage in passages:
        length = len(passage.context) + len(passage.continuation)
        if max_context is not None and length > max_context:
            raise ConfigError(
                f"{where} has {length} tokens, context and continuation together, the model's "
                f"context is {max_context}; use a smaller window, or raise the limit with "
                "--max-context if the model can take it"
            )


def check_call(length: int, new_tokens: int, max_context: int | None, where: str) -> None:
    """Make sure that a prompt of this length and its longest answer fit the model's context.

    Raises:
        ConfigError: they do not; nothing is ever cut.
    """
    if max_context is not None and length + new_tokens > max_context:
        raise ConfigError(
            f"{where} has a prompt of {length} tokens and may take {new_tokens} more, the model's "
            f"context is {max_context}; ask for shorter prompts, or raise the limit with "
            "--max-context if the model can take it"
        )
