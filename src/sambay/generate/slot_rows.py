"""Who is in which slot, and how each slot's next token is chosen."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from sambay.generate.batch import Row, RunningBatch
from sambay.generate.requests import Request, TokenEvent
from sambay.generate.sampling import SamplingTable

_NOBODY = Row(-1, Request([0], None), random.Random(0), finished=True)


class SlotRows:
    """The rows of a fixed number of slots; those without one are idle."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._slots: list[Row | None] = [None] * num_slots
        self._vocab_size, self._device = vocab_size, device
        self._seen_BV: Tensor | None = None
        self._batch: RunningBatch | None = None  # of the first few slots, as long as they stay

    @property
    def free(self) -> list[int]:
        """The idle slots, lowest first."""
        return [slot for slot, row in enumerate(self._slots) if row is None]

    @property
    def taken(self) -> list[int]:
        """The slots with a row, lowest first."""
        return [slot for slot, row in enumerate(self._slots) if row is not None]

    def find(self, number: int) -> int | None:
        """The slot of a request, None if it has none."""
        for slot, row in enumerate(self._slots):
            if row is not None and row.number == number:
                return slot
        return None

    def put(self, slot: int, row: Row, prompt_T: Tensor, token: int) -> None:
        """Give a slot to a row that has produced its first token."""
        assert self._slots[slot] is None, "a slot has one row at a time"
        self._slots[slot], self._batch = row, None
        if row.request.sampling.repetition_penalty == 1:
            return
        if self._seen_BV is None:
            shape = (len(self._slots), self._vocab_size)
            self._seen_BV = torch.zeros(shape, dtype=torch.bool, device=self._device)
        self._seen_BV[slot] = False
        self._seen_BV[slot, prompt_T.to(self._device)] = True
        self._seen_BV[slot, token] = True

    def release(self, slot: int) -> None:
        """Make a slot idle."""
        self._slots[slot], self._batch = None, None

    def move(self, slot: int, target: int) -> None:
        """Bring the row of a slot to an idle one."""
        self._slots[target], self._slots[slot], self._batch = self._slots[slot], None, None
        if self._seen_BV is not None:
            self._seen_BV[target] = self._seen_BV[slot]

    def choose(self, logits_BV: Tensor) -> tuple[Tensor, list[TokenEvent]]:
        """The next token of each of the first slots, (width,) int64, and the events of taken ones.

        Raises:
            SambayError: logits that are not numbers, in a taken slot.
        """
        width = len(logits_BV)
        if self._batch is None or len(self._batch.rows) != width:
            self._batch = self._batch_of(width)
        logprobs = self._batch.choose(logits_BV)
        return self._batch.tokens_B, self._batch.record(logprobs, has_room=True)

    def finished(self) -> Sequence[int]:
        """The slots whose row has ended."""
        return [s for s, row in enumerate(self._slots) if row is not None and row.finished]

    def _batch_of(self, width: int) -> RunningBatch:
        batch = RunningBatch([], [], [], self._vocab_size, self._device)
        batch.rows = [row or _NOBODY for row in self._slots[:width]]
        batch.table = SamplingTable([row.request.sampling for row in batch.rows], self._device)
        if batch.table.penalises:
            assert self._seen_BV is not None, "made when the row came"
            batch.seen_BV = self._seen_BV[:width]
        return batch
