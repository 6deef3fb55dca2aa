"""Continuous batching inside one process: a fixed number of slots, refilled as they become free.

Every slot has a text of its own length in buffers that are planned before the start and never move.
A request waits until a slot is free, is prefilled into it while the others wait, and from then on
takes part in the decode steps of all slots; the slot is free again when it ends or is cancelled.

A row's tokens are chosen from its own logits, settings and random stream, so its result does not
depend on the other rows, except as far as matrix products round differently at other widths.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sambay.errors import ConfigError
from sambay.generate.batch import DROP_BELOW, RunningBatch
from sambay.generate.decode_step import DecodeStep, weight_places
from sambay.generate.memory import available_bytes, require_slots
from sambay.generate.prefill import distinct, padding, prefill
from sambay.generate.requests import Completion, Request, Timings, TokenEvent, checked_prompt
from sambay.generate.slot_rows import SlotRows
from sambay.model import LanguageModel, ModelCache
from sambay.model.slots import SlotCache

LEAST_SHARE = 0.75
"""Prompts prefilled together are at least this share of the longest: the rest is padding."""


class _Waiting(NamedTuple):
    number: int
    request: Request
    prompt: Tensor


class _Kept(NamedTuple):
    """A prompt that the next request has too."""

    prompt: Tensor
    cache: ModelCache
    row: int
    logits: Tensor


class SlotEngine:
    """Continues any number of prompts, `slots` of them at a time.

    model: on any device, in float32 or narrower. Its weights must stay as they are while the engine
        exists: steps are captured, and what follows from weights alone is computed once.
    capacity: columns of a slot: a prompt and what it produces but the last token.
    prefill_chunk: tokens (rows x columns) per prefill call, which bounds the activations.
    capture: whether decode steps are captured where that is possible: as CUDA graphs, on a CPU as
        lists of kernels; `step_mode` says what became of it.
    timings: where to count what is done; a fresh one by default.

    Raises:
        ConfigError: a number below 1, or a model in float64.
        NotEnoughMemory: the slots would not fit; names how many, or how large ones, would.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        slots: int,
        capacity: int,
        prefill_chunk: int = 2048,
        capture: bool = True,
        timings: Timings | None = None,
    ) -> None:
        for name, value in (
            ("slots", slots), ("capacity", capacity), ("prefill_chunk", prefill_chunk),
        ):  # fmt: skip
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        weight = model.head_weight
        if weight.dtype is torch.float64:
            raise ConfigError(
                "the model is in torch.float64; its cache keeps float32 states; "
                "use model.float() or model.bfloat16()"
            )
        require_slots(
            model.config, slots, capacity, chunk=prefill_chunk, value_bytes=weight.dtype.itemsize,
            available=available_bytes(weight.device), device=weight.device,
        )  # fmt: skip
        self.model, self.capacity, self.prefill_chunk = model, capacity, prefill_chunk
        self.timings = Timings() if timings is None else timings
        self._cache = SlotCache(model, slots, capacity, weight.dtype)
        self._step = DecodeStep(model, self._cache, capture=capture)
        self._rows = SlotRows(slots, model.config.vocab_size, weight.device)
        self._columns = [0] * slots  # of each slot, on the host
        self._waiting: deque[_Waiting] = deque()
        self._kept: _Kept | None = None
        self._submitted = 0
        self._weights = weight_places(model)

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests in a slot."""
        return len(self._rows.taken)

    @property
    def cache_bytes(self) -> int:
        """The bytes of all slots."""
        return self._cache.nbytes

    @property
    def step_mode(self) -> str:
        """ "captured", or "plain" with the reason in brackets."""
        reason = self._step.why_not_captured
        return "captured" if reason is None else f"plain ({reason})"

    def submit(self, request: Request) -> int:
        """The number of a request that from now on waits for a slot.

        Without `max_new_tokens` it ends when its slot is full.

        Raises:
            ConfigError: as `Engine.generate`, or a request longer than a slot, or weights that
                changed since the engine was made.
        """
        number = self._submitted
        waiting = _Waiting(number, *self._checked(request, number))
        self._submitted += 1
        self._waiting.append(waiting)
        return number

    def cancel(self, number: int) -> bool:
        """Whether a request was waiting or running; it is forgotten, and its slot is free."""
        slot = self._rows.find(number)
        if slot is not None:
            self._release(slot)
            return True
        before = len(self._waiting)
        self._waiting = deque(entry for entry in self._waiting if entry.number != number)
        return len(self._waiting) < before

    def step(self) -> list[TokenEvent]:
        """Fill free slots from the queue, then take one decode step; the tokens this produced.

        `TokenEvent.request` is what `submit` gave. Nothing is left to do when it returns none.
        """
        events = self._admit()
        if self._rows.taken:
            events += self._decode()
        return events

    def stream(self, requests: Sequence[Request]) -> Iterator[TokenEvent]:
        """Tokens as they are produced; closing the iterator cancels what has not ended.

        `TokenEvent.request` is the place in `requests`. Checks at the call, computes as the
        iterator is read.

        Raises:
            ConfigError: as `submit`; or, when it is read, an engine with other requests in it, for
                which `submit` and `step` are made.
        """
        for place, request in enumerate(requests):
            self._checked(request, place)
        return self._stream(requests)

    def generate(
        self,
        requests: Sequence[Request],
        on_finished: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """The completion of each request, in their order.

        `on_finished(place, completion)` is called as soon as a request ends. Raises as `stream`.
        """
        completions = [Completion() for _ in requests]
        for event in self.stream(requests):
            completions[event.request].extend(event)
            if event.finish_reason is not None and on_finished is not None:
                on_finished(event.request, completions[event.request])
        return completions

    def _stream(self, requests: Sequence[Request]) -> Iterator[TokenEvent]:
        if self._waiting or self._rows.taken:
            raise ConfigError("the slot engine is at work; use submit and step to mix requests")
        first = self._submitted
        unfinished = {self.submit(request) for request in requests}
        try:
            while unfinished:
                for event in self.step():
                    if event.finish_reason is not None:
                        unfinished.discard(event.request)
                    yield dataclasses.replace(event, request=event.request - first)
        finally:
            for number in unfinished:
                self.cancel(number)
            self._kept = None

    def _checked(self, request: Request, number: int) -> tuple[Request, Tensor]:
        if weight_places(self.model) != self._weights:
            raise ConfigError(
                "the model's weights changed after the slot engine was made; make another one"
            )
        prompt_T = checked_prompt(request, number, self.model.config.vocab_size)
        room = self.capacity + 1 - len(prompt_T)  # the last token is never fed back
        wanted = 1 if request.max_new_tokens is None else request.max_new_tokens
        if wanted > room:
            raise ConfigError(
                f"prompt {number} has {len(prompt_T)} tokens and wants {wanted} new ones, a slot "
                f"has {self.capacity} columns; give capacity={len(prompt_T) + wanted - 1} or more"
            )
        if request.max_new_tokens is None:
            request = dataclasses.replace(request, max_new_tokens=room)
        return request, prompt_T

    def _admit(self) -> list[TokenEvent]:
        events: list[TokenEvent] = []
        while self._waiting and (free := self._rows.free):
            started = time.perf_counter()
            group = self._next_group(len(free))
            slots, prompts = free[: len(group)], [entry.prompt for entry in group]
            logits_BV = self._prefill(prompts, slots)
            batch = RunningBatch(
                [entry.number for entry in group],
                [entry.request for entry in group],
                prompts,
                self.model.config.vocab_size,
                logits_BV.device,
            )
            events += batch.record(batch.choose(logits_BV), has_room=True)
            self._step.tokens_B[torch.tensor(slots, device=logits_BV.device)] = batch.tokens_B
            for slot, row, prompt_T, token in zip(
                slots, batch.rows, prompts, batch.tokens_B.tolist(), strict=True
            ):
                if not row.finished:
                    self._rows.put(slot, row, prompt_T, token)
                    self._columns[slot] = len(prompt_T)
                    self._cache.set_length(slot, len(prompt_T))
            self.timings.prefill_seconds += time.perf_counter() - started
        return events

    def _next_group(self, most: int) -> list[_Waiting]:
        """The next requests that are prefilled together: of similar length and one call at most."""
        group = [self._waiting.popleft()]
        longest = shortest = len(group[0].prompt)
        different = {group[0].prompt.numpy().tobytes()}
        while self._waiting and len(group) < most:
            prompt_T = self._waiting[0].prompt
            longest, shortest = max(longest, len(prompt_T)), min(shortest, len(prompt_T))
            different.add(prompt_T.numpy().tobytes())
            too_many = len(different) > 1 and len(different) * longest > self.prefill_chunk
            if too_many or shortest < LEAST_SHARE * longest:
                break
            group.append(self._waiting.popleft())
        return group

    @torch.inference_mode()
    def _prefill(self, prompts: Sequence[Tensor], slots: Sequence[int]) -> Tensor:
        """The logits after the prompts, (B, V), which are then in the slots."""
        model, chunk = self.model, self.prefill_chunk
        unique, source = distinct(prompts)
        kept, self._kept = self._kept, None
        following = self._waiting[0].prompt if self._waiting else None
        repeats = following is not None and any(torch.equal(following, one) for one in unique)
        if kept is not None and len(unique) == 1 and torch.equal(kept.prompt, unique[0]):
            cache, rows, logits_BV = kept.cache, [kept.row], kept.logits
            self._kept = kept if repeats else None
        elif len(unique) == 1 and not (repeats and len(unique[0]) <= chunk):
            # In place, without a second copy of what may be a long prompt.
            logits_BV = prefill(model, unique, self._cache.empty(slots[0]), chunk)
            self.timings.prefill_tokens += len(unique[0])
            for slot in slots[1:]:
                self._cache.copy(slots[0], slot, len(unique[0]))
            return logits_BV.expand(len(prompts), -1)
        else:
            size = (len(unique), max(map(len, unique)))
            weight = model.head_weight
            starts = padding(unique, weight.device)
            cache = ModelCache.allocate(model.config, *size, weight.dtype, weight.device, starts)
            logits_BV = prefill(model, unique, cache, chunk)
            rows = list(range(len(unique)))
            self.timings.prefill_tokens += sum(map(len, unique))
            if repeats and following is not None:
                row = next(i for i, one in enumerate(unique) if torch.equal(following, one))
                self._kept = _Kept(following, cache, row, logits_BV[row : row + 1])
        for slot, place in zip(slots, source, strict=True):
            self._cache.take(slot, cache, rows[place])
        return logits_BV[torch.tensor(source, device=logits_BV.device)]

    def _decode(self) -> list[TokenEvent]:
        started = time.perf_counter()
        self._close_up()
        taken = self._rows.taken
        logits_BV = self._step.run(self._step.width(taken[-1] + 1))
        tokens_B, events = self._rows.choose(logits_BV)
        self._step.tokens_B[: len(tokens_B)] = tokens_B
        for slot in taken:
            self._columns[slot] += 1
        for slot in self._rows.finished():
            self._release(slot)
        self.timings.decode_tokens += len(taken)
        self.timings.decode_seconds += time.perf_counter() - started
        return events

    def _close_up(self) -> None:
        """Move rows to lower slots once enough of those are idle that a narrower step serves."""
        taken, narrower = self._rows.taken, self._step.width(len(self._rows.taken))
        width = self._step.width(taken[-1] + 1)
        if narrower == width or len(taken) > DROP_BELOW * width:
            return
        for target in self._rows.free:
            slot = self._rows.taken[-1]
            if target > slot:
                break
            self._cache.copy(slot, target, self._columns[slot])
            self._cache.set_length(target, self._columns[slot])
            self._step.tokens_B[target] = self._step.tokens_B[slot]
            self._rows.move(slot, target)
            self._columns[target] = self._columns[slot]
            self._cache.set_length(slot, 0)

    def _release(self, slot: int) -> None:
        self._rows.release(slot)
        self._cache.set_length(slot, 0)
