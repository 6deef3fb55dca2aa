"""Text in, text out: a tokenizer around the engine, with stop strings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from sambay.data.stream_decoder import StreamDecoder
from sambay.data.tokenizer import Tokenizer
from sambay.errors import ConfigError
from sambay.generate.engine import Engine
from sambay.generate.requests import Completion, FinishReason, Request, TokenEvent
from sambay.generate.sampling import GREEDY, SamplingParams, sample_seed
from sambay.generate.session import Session
from sambay.generate.stopping import StopMatcher


@dataclass(frozen=True)
class TextCompletion:
    """One continuation of one prompt.

    text: without the prompt and without the stop string or stop token that ended it.
    tokens, logprobs: everything the model produced, as in `Completion`.
    prompt, sample: which prompt, and which of its samples, this continues.
    """

    prompt: int
    sample: int
    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason


class TextGenerator:
    """Continues texts with an engine and the tokenizer of its model.

    Raises:
        ConfigError: the tokenizer has ids that the model does not know.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        vocab_size = engine.model.config.vocab_size
        if tokenizer.vocab_size > vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model's vocab_size is "
                f"{vocab_size}; use the tokenizer that belongs to the model"
            )
        self.engine = engine
        self.tokenizer = tokenizer

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int | None,
        sampling: SamplingParams = GREEDY,
        stop: Sequence[str] = (),
        stop_token_ids: Iterable[int] | None = None,
        num_samples: int = 1,
        max_batch_size: int = 32,
        on_finished: Callable[[TextCompletion], None] | None = None,
    ) -> list[TextCompletion]:
        """`num_samples` continuations of every prompt: all of the first, all of the second, ...

        prompts: texts, taken as plain text, or token ids (which may hold control tokens).
        stop_token_ids: instead of the tokenizer's end-of-sequence token; () goes on past it.
        sampling: sample number j of every prompt draws with `sample_seed(seed, j)`.
        on_finished: called with each continuation as soon as it ends, in that order.

        Raises:
            ConfigError: an empty prompt or stop string, a number out of range.
            NotEnoughMemory: a single prompt does not fit; nothing was computed.
        """
        if num_samples < 1:
            raise ConfigError(f"num_samples is {num_samples}; it must be at least 1")
        readers: list[TextReader] = []
        requests: list[Request] = []
        for prompt in prompts:
            ids = self._encoded(prompt)
            for sample in range(num_samples):
                reader = self._reader(stop, stop_token_ids)
                seed = sample_seed(sampling.seed, sample)
                readers.append(reader)
                requests.append(
                    Request(
                        ids,
                        max_new_tokens,
                        dataclasses.replace(sampling, seed=seed),
                        reader.stop_token_ids,
                        reader.read,
                    )
                )
        finished: dict[int, TextCompletion] = {}

        def finish(number: int, completion: Completion) -> None:
            assert completion.finish_reason is not None
            readers[number].finish()
            finished[number] = TextCompletion(
                prompt=number // num_samples,
                sample=number % num_samples,
                text=readers[number].text,
                tokens=completion.tokens,
                logprobs=completion.logprobs,
                finish_reason=completion.finish_reason,
            )
            if on_finished is not None:
                on_finished(finished[number])

        self.engine.generate_many(requests, max_batch_size=max_batch_size, on_finished=finish)
        return [finished[number] for number in range(len(requests))]

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int | None,
        sampling: SamplingParams = GREEDY,
        stop: Sequence[str] = (),
        stop_token_ids: Iterable[int] | None = None,
    ) -> TextStream:
        """An iterator over pieces of the continuation; arguments and errors as in `generate`.

        Pieces are never empty and never end inside a character; together they are the `text` that
        `generate` returns.
        """
        reader = self._reader(stop, stop_token_ids)
        ids = self._encoded(prompt)
        request = Request(ids, max_new_tokens, sampling, reader.stop_token_ids, reader.read)
        self.engine.check([request])
        return TextStream(Session(self.engine).stream(request), reader)

    def _encoded(self, prompt: str | Sequence[int]) -> Sequence[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt

    def _reader(self, stop: Sequence[str], stop_token_ids: Iterable[int] | None) -> TextReader:
        if isinstance(stop, str):
            raise ConfigError(f"stop is the text {stop!r}; give a list of stop strings")
        ids = (self.tokenizer.eos_id,) if stop_token_ids is None else stop_token_ids
        return TextReader(self.tokenizer, stop, ids)


class TextStream(Iterator[str]):
    """Pieces of one continuation; `tokens` grows with them, `finish_reason` is set at the end."""

    def __init__(self, events: Iterator[TokenEvent], reader: TextReader) -> None:
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._events = events
        self._reader = reader

    def __next__(self) -> str:
        for event in self._events:
            self.tokens.append(event.token)
            self.finish_reason = event.finish_reason
            if event.finish_reason is not None:
                self._reader.finish()
            if piece := self._reader.take():
                return piece
        raise StopIteration

    def close(self) -> None:
        """Stop generating and free the cache."""
        close = getattr(self._events, "close", None)
        if close is not None:
            close()


class TextReader:
    """Reads one request's tokens as text and says when a stop string is complete.

    stop: texts that end the continuation and do not belong to it, nor do the `stop_token_ids`.

    Raises:
        ConfigError: an empty stop string.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Iterable[str], stop_token_ids: Iterable[int]
    ) -> None:
        self.stop_token_ids = frozenset(stop_token_ids)
        self._decoder = StreamDecoder(tokenizer)
        self._matcher = StopMatcher(stop)
        self._pieces: list[str] = []
        self._num_taken = 0

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def read(self, token: int) -> bool:
        """Take in the next token; True once a stop string is complete."""
        if token not in self.stop_token_ids:
            self._pieces.append(self._matcher.push(self._decoder.push(token)))
        return self._matcher.matched is not None

    def finish(self) -> None:
        """No more tokens will come: what was held back belongs to the text."""
        self._pieces.append(self._matcher.push(self._decoder.finish()))
        self._pieces.append(self._matcher.finish())

    def take(self) -> str:
        """The text that has become certain since the last call."""
        new = "".join(self._pieces[self._num_taken :])
        self._num_taken = len(self._pieces)
        return new
