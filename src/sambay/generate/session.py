"""One growing text, such as a conversation: the cache is kept from one continuation to the next."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from sambay.generate.batch import RunningBatch
from sambay.generate.decode_step import DecodeStep, weight_places
from sambay.generate.engine import FIRST_GROWTH, Engine
from sambay.generate.memory import available_bytes, batch_bytes, require_memory
from sambay.generate.prefill import prefill
from sambay.generate.requests import Request, TokenEvent, checked_prompt
from sambay.model.slots import SlotCache


class Session:
    """Continues one text again and again, computing only the tokens that are new.

    What the model keeps of a text cannot be shortened: a prompt that does not begin with the text
    held so far is computed from its start, and so is any after the model's weights changed.

    The text has the only slot of a `SlotCache`, so that its decode steps are those of `SlotEngine`,
    captured where that is possible; they are captured anew when the slot has grown.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._cache: SlotCache | None = None
        self._step: DecodeStep | None = None
        self._weights: list[tuple[int, int]] = []
        self._held: list[int] = []
        self._turn = 0

    @property
    def length(self) -> int:
        """The number of tokens in the cache."""
        return len(self._held)

    def reset(self) -> None:
        """Forget the text and free its cache."""
        self._cache, self._step, self._held = None, None, []

    def stream(self, request: Request) -> Iterator[TokenEvent]:
        """The continuation of `request.prompt`, the whole text so far, token by token.

        Gives what `Engine.stream([request])` gives. It may be abandoned after any token. An
        exception while the model is at work empties the cache, and nothing else is lost.

        Raises:
            ConfigError: an empty prompt, a token outside the vocabulary, a limit below 1.
            NotEnoughMemory: the text does not fit; nothing was computed.
        """
        prompt_T = checked_prompt(request, 0, self.engine.model.config.vocab_size)
        ids, weights = prompt_T.tolist(), weight_places(self.engine.model)
        begins_with_held = len(self._held) < len(ids) and ids[: len(self._held)] == self._held
        if not begins_with_held or weights != self._weights:
            self.reset()
        self._weights = weights
        self._make_room(len(ids))
        self._turn += 1
        return self._run(request, prompt_T, self._turn)

    def _run(self, request: Request, prompt_T: Tensor, turn: int) -> Iterator[TokenEvent]:
        engine, timings = self.engine, self.engine.timings
        vocab_size = engine.model.config.vocab_size
        batch = RunningBatch([0], [request], [prompt_T], vocab_size, engine.device)
        started = time.perf_counter()
        num_new = len(prompt_T) - len(self._held)
        logprobs = batch.choose(self._feed(prompt_T[len(self._held) :]))
        timings.prefill_tokens += num_new
        timings.prefill_seconds += time.perf_counter() - started
        yield from batch.record(logprobs, self._has_room())
        while batch.num_alive > 0:
            assert self._cache is not None
            assert turn == self._turn, "an older continuation was read on after a newer one began"
            started = time.perf_counter()
            if len(self._held) == self._cache.capacity:
                self._make_room(2 * self._cache.capacity)
            logprobs = batch.choose(self._feed(batch.tokens_B.cpu()))
            timings.decode_tokens += 1
            timings.decode_seconds += time.perf_counter() - started
            yield from batch.record(logprobs, self._has_room())

    @torch.inference_mode()
    def _feed(self, tokens_T: Tensor) -> Tensor:
        """Logits after more of the text, (1, V)."""
        complete = False
        try:
            logits_BV = self._decode(tokens_T) if self._is_step(tokens_T) else self._read(tokens_T)
            self._held += tokens_T.tolist()
            complete = True
        finally:
            if not complete:  # some layers may have seen tokens that others have not
                self.reset()
        return logits_BV

    def _is_step(self, tokens_T: Tensor) -> bool:
        return bool(self._held) and len(tokens_T) == 1

    def _decode(self, token_T: Tensor) -> Tensor:
        assert self._cache is not None
        if self._step is None:
            with self._cache.all_idle():  # what a capture computes is thrown away
                self._step = DecodeStep(self.engine.model, self._cache)
        self._step.tokens_B.copy_(token_T)
        return self._step.run(1)

    def _read(self, tokens_T: Tensor) -> Tensor:
        """As prefill does; the columns before need not be none."""
        assert self._cache is not None
        row = self._cache.empty(0) if not self._held else self._cache.row(0, len(self._held))
        logits_BV = prefill(self.engine.model, [tokens_T], row, self.engine.prefill_chunk)
        self._cache.set_length(0, row.length)
        return logits_BV

    @torch.inference_mode()
    def _make_room(self, columns: int) -> None:
        """Let the slot hold `columns` columns, with some room to grow if there is none yet.

        Raises:
            NotEnoughMemory: that much would not fit beside what there is.
        """
        if self._cache is not None and columns <= self._cache.capacity:
            return
        engine, config = self.engine, self.engine.model.config
        # Rings are as long as the window or the whole cache, and do not grow with it.
        columns = max(columns + FIRST_GROWTH, config.window or 0)
        require_memory(
            config, 1, columns, chunk=engine.prefill_chunk, value_bytes=engine.dtype.itemsize,
            device=engine.device,
        )  # fmt: skip
        self._step = None
        if self._cache is None:
            self._cache = SlotCache(engine.model, 1, columns, engine.dtype)
        else:
            self._cache.reserve(columns)

    def _has_room(self) -> bool:
        """Whether one more column can be stored, if need be in a cache of twice the size."""
        assert self._cache is not None
        if len(self._held) < self._cache.capacity:
            return True
        engine = self.engine
        available = available_bytes(engine.device)
        needed = batch_bytes(
            engine.model.config, 1, 2 * self._cache.capacity + FIRST_GROWTH,
            chunk=engine.prefill_chunk, value_bytes=engine.dtype.itemsize,
        )  # fmt: skip
        return available is None or needed <= available
