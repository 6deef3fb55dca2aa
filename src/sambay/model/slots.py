"""The states of a fixed number of slots, each with a text of its own length.

A slot holds what the model keeps of one text, without padding: column c of the text is column c of
the slot, or lies at c modulo the size of a ring. Buffers are those of `ModelCache`, allocated once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sambay.layers.slots import SlotLayer
from sambay.layers.state import RecurrentState
from sambay.model.cache import ModelCache
from sambay.model.model import LanguageModel


class SlotCache:
    """States, and the number of columns `lengths_B` (int64) of every slot; 0 is an idle one.

    capacity: the columns there are in each slot.
    """

    @torch.inference_mode()
    def __init__(
        self, model: LanguageModel, num_slots: int, capacity: int, dtype: torch.dtype
    ) -> None:
        device = model.head_weight.device
        self._cache = ModelCache.allocate(model.config, num_slots, capacity, dtype, device)
        for state in self._states:
            for buffer in state.buffers.values():
                buffer.zero_()  # takes the memory now instead of step by step
        self.num_slots, self.capacity = num_slots, capacity
        self.lengths_B = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._constants = [_constants(block) for block in model.blocks]
        self._layers: dict[int, list[SlotLayer]] = {}

    @property
    def nbytes(self) -> int:
        """The bytes of all buffers."""
        return self._cache.nbytes

    @property
    def _states(self):
        return [state for state in self._cache.layers if state is not None]

    def layers(self, width: int) -> Sequence[SlotLayer]:
        """What each layer has in a step over the first `width` slots."""
        if width not in self._layers:
            states = [
                None if state is None else state.rows(0, width) for state in self._cache.layers
            ]
            self._layers[width] = [
                SlotLayer(state, constants)
                for state, constants in zip(states, self._constants, strict=True)
            ]
        return self._layers[width]

    @torch.inference_mode()
    def reserve(self, capacity: int) -> None:
        """Make room for more columns in every slot; what holds columns moves in memory."""
        self._cache.reserve(capacity)
        self.capacity = max(capacity, self.capacity)
        self._layers.clear()

    def row(self, slot: int, columns: int) -> ModelCache:
        """A cache of one row in the memory of a slot that holds `columns`: goes on in place."""
        layers = [None if state is None else state.rows(slot, 1) for state in self._cache.layers]
        cache = ModelCache(layers, None)
        cache.length = columns
        return cache

    @contextlib.contextmanager
    def all_idle(self) -> Iterator[None]:
        """Within it every slot is idle, behind it all is as before, whatever steps were taken.

        An idle slot stores no column, but its recurrent states move on.
        """
        buffers = [self.lengths_B]
        for state in self._states:
            if isinstance(state, RecurrentState):
                buffers += state.buffers.values()
        kept = [buffer.clone() for buffer in buffers]
        with torch.inference_mode():
            self.lengths_B.zero_()
        try:
            yield
        finally:
            with torch.inference_mode():
                for buffer, values in zip(buffers, kept, strict=True):
                    buffer.copy_(values)

    @torch.inference_mode()
    def empty(self, slot: int) -> ModelCache:
        """A cache of one row without columns in the memory of a slot: prefill it in place."""
        cache = self.row(slot, 0)
        for state in cache.layers:
            if state is not None:
                state.clear()
        return cache

    @torch.inference_mode()
    def take(self, slot: int, cache: ModelCache, row: int) -> None:
        """Copy a row of a cache, without its padding, into a slot."""
        start = 0 if cache.starts is None else int(cache.starts[row])
        for mine, theirs in zip(self._cache.layers, cache.layers, strict=True):
            if mine is not None and theirs is not None:
                mine.take_row(slot, theirs, row, start, cache.length)

    @torch.inference_mode()
    def copy(self, slot: int, target: int, columns: int) -> None:
        """Copy a slot that holds `columns` columns to another."""
        for state in self._states:
            state.copy_row(slot, target, columns)

    @torch.inference_mode()
    def set_length(self, slot: int, columns: int) -> None:
        """Say how many columns a slot holds; 0 makes it idle."""
        self.lengths_B[slot] = columns


def _constants(block: torch.nn.Module) -> dict[str, Tensor]:
    """What a block's mixer wants computed once; most have nothing of the kind."""
    compute = getattr(block.mixer, "decode_constants", None)
    return {} if compute is None else compute()
