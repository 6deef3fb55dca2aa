"""Prefill and decode for batches of token ids; knows nothing of text.

Rows of unequal length end together (left padding). All prompt columns pass through the
self-decoder only; the cross-decoder and the head see the last column (arXiv 2507.06607, section 2).

A row's tokens are chosen from its own logits, settings and random stream, so its result does not
depend on the other rows, except as far as matrix products round differently at other batch sizes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sambay.errors import ConfigError
from sambay.generate.batch import RunningBatch
from sambay.generate.memory import available_bytes, batch_bytes, require_memory, slots_bytes
from sambay.generate.prefill import distinct, padding, prefill
from sambay.generate.requests import (
    Completion,
    Request,
    Timings,
    TokenEvent,
    checked_prompt,
    plan_batches,
    plan_pools,
)
from sambay.generate.slot_engine import SlotEngine
from sambay.model import LanguageModel, ModelCache

FIRST_GROWTH = 256
"""Columns reserved beyond the prompt for requests without a limit; doubled when used up."""

MEMORY_SHARE = 0.9
"""Part of the available memory that `generate_many` plans to use."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Engine:
    """Continues prompts with a model.

    model: on any device, in float32 or narrower; its parameters are only read.
    prefill_chunk: tokens (rows x columns) per prefill call, which bounds the activations.

    Raises:
        ConfigError: `prefill_chunk` below 1, or a model in float64.
    """

    def __init__(self, model: LanguageModel, *, prefill_chunk: int = 2048) -> None:
        if prefill_chunk < 1:
            raise ConfigError(f"prefill_chunk is {prefill_chunk}; it must be at least 1")
        if model.head_weight.dtype not in _DTYPES:
            raise ConfigError(
                f"the model is in {model.head_weight.dtype}; its cache keeps float32 states; "
                "use model.float() or model.bfloat16()"
            )
        self.model = model
        self.prefill_chunk = prefill_chunk
        self.timings = Timings()

    @property
    def device(self) -> torch.device:
        return self.model.head_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values in the cache: that of the model's weights."""
        return self.model.head_weight.dtype

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """The completion of each request, all run as one batch.

        Raises:
            ConfigError: an empty prompt, a token outside the vocabulary, a limit below 1.
            NotEnoughMemory: the batch would not fit; nothing was computed.
        """
        completions = [Completion() for _ in requests]
        for event in self.stream(requests):
            completions[event.request].extend(event)
        return completions

    def stream(self, requests: Sequence[Request]) -> Iterator[TokenEvent]:
        """Tokens as they are produced: step by step, within a step by request.

        Checks at the call, computes as the iterator is read, and frees the cache when it is closed.
        Raises as `generate` does.
        """
        return self._run(list(range(len(requests))), requests, self.check(requests))

    def check(self, requests: Sequence[Request]) -> list[Tensor]:
        """The prompts of requests that could run as one batch, in int64.

        Raises as `generate` does.
        """
        prompts = self._checked(requests)
        self._require_memory(prompts, requests)
        return prompts

    def generate_many(
        self,
        requests: Sequence[Request],
        *,
        max_batch_size: int,
        max_bytes: int | None = None,
        on_finished: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """The completion of each of any number of requests, in their order.

        They run in at most `max_batch_size` slots (see `SlotEngine`) that take at most `max_bytes`
        of memory (None: most of what is available now), the longest prompts first; a slot that
        becomes free is refilled. Where a request has no limit nothing can be planned: then they
        run in batches of similar length. `on_finished(number, completion)` is called as soon as a
        request ends, so that a caller can store it.

        Raises as `generate` does, before anything is computed.
        """
        if max_batch_size < 1:
            raise ConfigError(f"max_batch_size is {max_batch_size}; it must be at least 1")
        prompts = self._checked(requests)
        lengths = [len(prompt_T) for prompt_T in prompts]
        new_columns = [_new_columns(request) for request in requests]
        if requests:
            largest = max(range(len(requests)), key=lambda i: lengths[i] + new_columns[i])
            self._require_memory([prompts[largest]], [requests[largest]])
        if max_bytes is None:
            available = available_bytes(self.device)
            max_bytes = None if available is None else int(available * MEMORY_SHARE)

        completions = [Completion() for _ in requests]

        def finish(number: int) -> None:
            if on_finished is not None:
                on_finished(number, completions[number])

        if all(request.max_new_tokens is not None for request in requests):
            self._fill_slots(requests, lengths, completions, max_batch_size, max_bytes, finish)
            return completions

        def fits(batch_size: int, columns: int) -> bool:
            return max_bytes is None or self._batch_bytes(batch_size, columns) <= max_bytes

        for batch in plan_batches(lengths, new_columns, max_batch_size, fits):
            chosen, ids = [requests[i] for i in batch], [prompts[i] for i in batch]
            self._require_memory(ids, chosen)
            for event in self._run(batch, chosen, ids):
                completions[event.request].extend(event)
                if event.finish_reason is not None:
                    finish(event.request)
        return completions

    def _fill_slots(
        self,
        requests: Sequence[Request],
        lengths: Sequence[int],
        completions: list[Completion],
        max_slots: int,
        max_bytes: int | None,
        finish: Callable[[int], None],
    ) -> None:
        """Continue requests in pools of slots."""

        def fits(num_slots: int, capacity: int) -> bool:
            needed = slots_bytes(
                self.model.config,
                num_slots,
                capacity,
                chunk=self.prefill_chunk,
                value_bytes=self.dtype.itemsize,
            )
            return max_bytes is None or needed <= max_bytes

        new_columns = [_new_columns(request) for request in requests]
        for pool in plan_pools(lengths, new_columns, max_slots, fits):
            engine = SlotEngine(
                self.model,
                slots=pool.num_slots,
                capacity=pool.capacity,
                prefill_chunk=self.prefill_chunk,
                timings=self.timings,
            )
            for event in engine.stream([requests[number] for number in pool.numbers]):
                number = pool.numbers[event.request]
                completions[number].extend(event)
                if event.finish_reason is not None:
                    finish(number)

    def _run(
        self, numbers: Sequence[int], requests: Sequence[Request], prompts: Sequence[Tensor]
    ) -> Iterator[TokenEvent]:
        if not requests:
            return
        batch = RunningBatch(numbers, requests, prompts, self.model.config.vocab_size, self.device)
        capacity = self._columns(prompts, requests)
        started = time.perf_counter()
        logits_BV, cache = self._prefill(prompts, capacity)
        logprobs = batch.choose(logits_BV)
        self.timings.prefill_seconds += time.perf_counter() - started
        yield from batch.record(logprobs, self._has_room(batch, cache, capacity))
        while batch.num_alive > 0:
            started = time.perf_counter()
            num_tokens = batch.num_alive
            keep_B = batch.rows_to_keep()
            if keep_B is not None and self._fits(cache.nbytes):  # dropping rows copies the rest
                batch.select(keep_B)
                cache.select_rows(keep_B)
            if cache.length == capacity:
                capacity *= 2
                cache.reserve(capacity)
            logprobs = batch.choose(self._decode(batch.tokens_B, cache))
            self.timings.decode_seconds += time.perf_counter() - started
            self.timings.decode_tokens += num_tokens
            yield from batch.record(logprobs, self._has_room(batch, cache, capacity))

    @torch.inference_mode()
    def _prefill(self, prompts: Sequence[Tensor], capacity: int) -> tuple[Tensor, ModelCache]:
        """Logits after the prompts, (B, V), and the cache of `capacity` columns that holds them."""
        unique, source = self._shared(prompts, capacity)
        cache = ModelCache.allocate(
            self.model.config,
            len(unique),
            capacity,
            dtype=self.dtype,
            device=self.device,
            starts=padding(unique, self.device),
        )
        logits_BV = prefill(self.model, unique, cache, self.prefill_chunk)
        self.timings.prefill_tokens += sum(len(prompt_T) for prompt_T in unique)
        if len(unique) < len(prompts):
            source_B = torch.tensor(source, device=self.device)
            cache.select_rows(source_B)
            logits_BV = logits_BV[source_B]
        return logits_BV, cache

    def _shared(self, prompts: Sequence[Tensor], capacity: int) -> tuple[list[Tensor], list[int]]:
        """The prompts to prefill, and for every row which of them it continues.

        Several samples of one prompt share a prefill, if memory allows the copying it takes.
        """
        unique, source = distinct(prompts)
        both = len(prompts) + len(unique)
        if len(unique) == len(prompts) or not self._fits(self._batch_bytes(both, capacity)):
            return list(prompts), list(range(len(prompts)))
        return unique, source

    @torch.inference_mode()
    def _decode(self, tokens_B: Tensor, cache: ModelCache) -> Tensor:
        h_B1D = self.model.hidden_states(tokens_B[:, None], cache=cache, outputs="last")
        return self.model.logits(h_B1D)[:, -1]

    def _checked(self, requests: Sequence[Request]) -> list[Tensor]:
        vocab_size = self.model.config.vocab_size
        return [checked_prompt(request, i, vocab_size) for i, request in enumerate(requests)]

    def _has_room(self, batch: RunningBatch, cache: ModelCache, capacity: int) -> bool:
        """Whether one more column can be stored, if need be in a cache of twice the size.

        While that is filled the old cache exists too, but its memory is in use already.
        """
        if cache.length < capacity:
            return True
        return self._fits(self._batch_bytes(len(batch.rows), capacity * 2))

    def _fits(self, num_bytes: int) -> bool:
        available = available_bytes(self.device)
        return available is None or num_bytes <= available

    def _batch_bytes(self, batch_size: int, columns: int) -> int:
        return batch_bytes(
            self.model.config,
            batch_size,
            columns,
            chunk=self.prefill_chunk,
            value_bytes=self.dtype.itemsize,
        )

    def _columns(self, prompts: Sequence[Tensor], requests: Sequence[Request]) -> int:
        """Cache columns of a batch."""
        columns = max(map(len, prompts)) + max(map(_new_columns, requests))
        if any(request.max_new_tokens is None for request in requests):
            # Rings are as long as the window or the whole cache, and do not grow with it.
            columns = max(columns, self.model.config.window or 0)
        return columns

    def _require_memory(self, prompts: Sequence[Tensor], requests: Sequence[Request]) -> None:
        if requests:
            require_memory(
                self.model.config,
                len(requests),
                self._columns(prompts, requests),
                chunk=self.prefill_chunk,
                value_bytes=self.dtype.itemsize,
                device=self.device,
            )


def _new_columns(request: Request) -> int:
    """Columns behind the prompt; the last token of a continuation is never fed back."""
    return FIRST_GROWTH if request.max_new_tokens is None else request.max_new_tokens - 1
