"""Prefill and decode for batches of token ids; knows nothing of text.

Rows of unequal length end together (left padding). All prompt columns pass through the
self-decoder only; the cross-decoder and the head see the last column (arXiv 2507.06607, section 2).

A row's tokens are chosen from its own logits, settings and random stream, so its result does not
depend on the other rows, except as far as matrix products round differently at other batch sizes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sambay.errors import ConfigError
from sambay.generate.batch import RunningBatch
from sambay.generate.memory import available_bytes, batch_bytes, require_memory
from sambay.generate.requests import (
    Completion,
    Request,
    TokenEvent,
    checked_prompt,
    plan_batches,
)
from sambay.model import LanguageModel, ModelCache

FIRST_GROWTH = 256
"""Columns reserved beyond the prompt for requests without a limit; doubled when used up."""

MEMORY_SHARE = 0.9
"""Part of the available memory that `generate_many` plans to use."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Timings:
    """What an engine has done so far, in tokens and seconds, sampling included.

    prefill_tokens counts prompt tokens without padding, a prompt that several requests share once;
    decode_tokens counts tokens produced after the first of each request.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0


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
            _extend(completions[event.request], event)
        return completions

    def stream(self, requests: Sequence[Request]) -> Iterator[TokenEvent]:
        """Tokens as they are produced: step by step, within a step by request.

        Checks at the call, computes as the iterator is read, and frees the cache when it is closed.
        Raises as `generate` does.
        """
        prompts = self._checked(requests)
        self._require_memory(prompts, requests)
        return self._run(list(range(len(requests))), requests, prompts)

    def generate_many(
        self,
        requests: Sequence[Request],
        *,
        max_batch_size: int,
        max_bytes: int | None = None,
        on_finished: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """The completion of each of any number of requests, in their order.

        They run in batches of similar length of at most `max_batch_size` rows and `max_bytes` of
        memory (None: most of what is available now). `on_finished(number, completion)` is called
        as soon as a request ends, so that a caller can store it.

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

        def fits(batch_size: int, columns: int) -> bool:
            return max_bytes is None or self._batch_bytes(batch_size, columns) <= max_bytes

        completions = [Completion() for _ in requests]
        for batch in plan_batches(lengths, new_columns, max_batch_size, fits):
            chosen, ids = [requests[i] for i in batch], [prompts[i] for i in batch]
            self._require_memory(ids, chosen)
            for event in self._run(batch, chosen, ids):
                _extend(completions[event.request], event)
                if event.finish_reason is not None and on_finished is not None:
                    on_finished(event.request, completions[event.request])
        return completions

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
        longest = max(len(prompt_T) for prompt_T in unique)
        padded_BT = torch.zeros(len(unique), longest, dtype=torch.int64)
        for row_T, prompt_T in zip(padded_BT, unique, strict=True):
            row_T[longest - len(prompt_T) :] = prompt_T
        starts = [longest - len(prompt_T) for prompt_T in unique]
        cache = ModelCache.allocate(
            self.model.config,
            len(unique),
            capacity,
            dtype=self.dtype,
            device=self.device,
            starts=torch.tensor(starts, device=self.device) if any(starts) else None,
        )
        padded_BT = padded_BT.to(self.device)
        width = max(1, self.prefill_chunk // len(unique))
        for begin in range(0, longest, width):
            chunk_BT = padded_BT[:, begin : begin + width]
            outputs = "last" if begin + width >= longest else "none"
            h_BTD = self.model.hidden_states(chunk_BT, cache=cache, outputs=outputs)
        logits_BV = self.model.logits(h_BTD)[:, -1]
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
        rows: dict[bytes, int] = {}
        source = [rows.setdefault(prompt_T.numpy().tobytes(), len(rows)) for prompt_T in prompts]
        both = len(prompts) + len(rows)
        if len(rows) == len(prompts) or not self._fits(self._batch_bytes(both, capacity)):
            return list(prompts), list(range(len(prompts)))
        return [prompts[source.index(row)] for row in range(len(rows))], source

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


def _extend(completion: Completion, event: TokenEvent) -> None:
    completion.tokens.append(event.token)
    completion.logprobs.append(event.logprob)
    completion.finish_reason = event.finish_reason
