"""One growing text, such as a conversation: the cache is kept from one continuation to the next."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from sambay.generate.batch import RunningBatch
from sambay.generate.engine import FIRST_GROWTH, Engine
from sambay.generate.memory import available_bytes, batch_bytes, require_memory
from sambay.generate.requests import Request, TokenEvent, checked_prompt
from sambay.model import ModelCache


class Session:
    """Continues one text again and again, computing only the tokens that are new.

    What the model keeps of a text cannot be shortened: a prompt that does not begin with the text
    held so far is computed from its start.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._cache: ModelCache | None = None
        self._capacity = 0
        self._held: list[int] = []
        self._turn = 0

    @property
    def length(self) -> int:
        """The number of tokens in the cache."""
        return len(self._held)

    def reset(self) -> None:
        """Forget the text and free its cache."""
        self._cache, self._capacity, self._held = None, 0, []

    def stream(self, request: Request) -> Iterator[TokenEvent]:
        """The continuation of `request.prompt`, the whole text so far, token by token.

        Gives what `Engine.stream([request])` gives. It may be abandoned after any token. An
        exception while the model is at work empties the cache, and nothing else is lost.

        Raises:
            ConfigError: an empty prompt, a token outside the vocabulary, a limit below 1.
            NotEnoughMemory: the text does not fit; nothing was computed.
        """
        prompt_T = checked_prompt(request, 0, self.engine.model.config.vocab_size)
        ids = prompt_T.tolist()
        if len(self._held) >= len(ids) or ids[: len(self._held)] != self._held:
            self.reset()
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
            assert turn == self._turn, "an older continuation was read on after a newer one began"
            started = time.perf_counter()
            if len(self._held) == self._capacity:
                self._make_room(2 * self._capacity)
            logprobs = batch.choose(self._feed(batch.tokens_B.cpu()))
            timings.decode_tokens += 1
            timings.decode_seconds += time.perf_counter() - started
            yield from batch.record(logprobs, self._has_room())

    @torch.inference_mode()
    def _feed(self, tokens_T: Tensor) -> Tensor:
        """Logits after more of the text, (1, V)."""
        assert self._cache is not None
        complete = False
        try:
            input_ids_BT = tokens_T[None].to(self.engine.device)
            width, columns = self.engine.prefill_chunk, len(tokens_T)
            for begin in range(0, columns, width):
                chunk_BT = input_ids_BT[:, begin : begin + width]
                outputs = "last" if begin + width >= columns else "none"
                h_BTD = self.engine.model.hidden_states(
                    chunk_BT, cache=self._cache, outputs=outputs
                )
            logits_BV = self.engine.model.logits(h_BTD)[:, -1]
            self._held += tokens_T.tolist()
            complete = True
        finally:
            if not complete:  # some layers may have seen tokens that others have not
                self.reset()
        return logits_BV

    @torch.inference_mode()
    def _make_room(self, columns: int) -> None:
        """Let the cache hold `columns` columns, with some room to grow if there is none yet.

        Raises:
            NotEnoughMemory: that much would not fit beside what there is.
        """
        if columns <= self._capacity:
            return
        engine, config = self.engine, self.engine.model.config
        # Rings are as long as the window or the whole cache, and do not grow with it.
        columns = max(columns + FIRST_GROWTH, config.window or 0)
        require_memory(
            config, 1, columns, chunk=engine.prefill_chunk, value_bytes=engine.dtype.itemsize,
            device=engine.device,
        )  # fmt: skip
        if self._cache is None:
            self._cache = ModelCache.allocate(config, 1, columns, engine.dtype, engine.device)
        else:
            self._cache.reserve(columns)
        self._capacity = columns

    def _has_room(self) -> bool:
        """Whether one more column can be stored, if need be in a cache of twice the size."""
        if len(self._held) < self._capacity:
            return True
        engine = self.engine
        available = available_bytes(engine.device)
        needed = batch_bytes(
            engine.model.config, 1, 2 * self._capacity + FIRST_GROWTH,
            chunk=engine.prefill_chunk, value_bytes=engine.dtype.itemsize,
        )  # fmt: skip
        return available is None or needed <= available
