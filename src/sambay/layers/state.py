"""The state one layer keeps between forwards; a cache holds one per layer that needs it.

Buffers are allocated once and written in place. In a forward all rows stand at the same column,
given by `context.offset`; in a decode step over slots each stands at its own.
"""

from __future__ import annotations

import abc
import copy
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from sambay.errors import ConfigError
from sambay.layers.context import BatchContext
from sambay.spec.recurrent import StateShape

if TYPE_CHECKING:
    from sambay.layers.slots import SlotStep


class LayerState:
    """A set of named buffers whose first dimension is the row of the batch."""

    def __init__(self, **buffers: Tensor) -> None:
        self.buffers = buffers

    @property
    def nbytes(self) -> int:
        """The bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def rows(self, first: int, count: int) -> Self:
        """A state of `count` rows from `first` on, in the same memory."""
        view = copy.copy(self)
        view.buffers = {name: x[first : first + count] for name, x in self.buffers.items()}
        return view

    def clear(self) -> None:
        """Make every row one without columns."""

    def copy_row(self, row: int, target: int, columns: int) -> None:
        """Copy row `row`, which holds `columns` columns, to row `target`."""
        for buffer in self.buffers.values():
            buffer[target] = buffer[row]

    def take_row(self, target: int, other: Self, row: int, start: int, end: int) -> None:
        """Copy columns `start` to `end`, all there are, of a row of another state to `target`."""
        for name, buffer in self.buffers.items():
            buffer[target] = other.buffers[name][row]

    def select_rows(self, index: Tensor) -> None:
        """Keep only the rows in `index` (int64), in that order.

        Rows that merely close up are moved in place, without a second copy of the state.
        """
        rows = index.tolist()
        closing_up = rows == sorted(set(rows))
        for name, buffer in self.buffers.items():
            with torch.inference_mode(buffer.is_inference()):  # such tensors change only there
                if not closing_up:
                    self.buffers[name] = buffer[index]
                    continue
                for new, old in enumerate(rows):
                    if new != old:
                        buffer[new] = buffer[old]
                self.buffers[name] = buffer[: len(rows)]


class RecurrentState(LayerState):
    """Convolution inputs `conv` (B, d_conv - 1, channels), oldest first, and the state `ssm`.

    `ssm` is (B, E, N) of Mamba, (B, H, P, N) of Mamba-2 and (B, H, K, V) of Gated DeltaNet; both
    are float32 and start as zeros.
    """

    def __init__(self, batch: int, shape: StateShape, device: torch.device) -> None:
        super().__init__(
            conv=torch.zeros(batch, *shape.conv, device=device),
            ssm=torch.zeros(batch, *shape.ssm, device=device),
        )

    def clear(self) -> None:
        """Make every row one without columns."""
        for buffer in self.buffers.values():
            buffer.zero_()


class KVState(LayerState, abc.ABC):
    """Keys and values of attention, (B, K, columns, P) each.

    window: the most columns that are ever needed; None if all are.
    """

    def __init__(
        self,
        batch: int,
        K: int,
        capacity: int,
        P: int,
        dtype: torch.dtype,
        device: torch.device,
        window: int | None = None,
    ) -> None:
        self.window = window
        shape = (batch, K, self._columns_for(capacity), P)
        super().__init__(
            keys=torch.empty(shape, dtype=dtype, device=device),
            values=torch.empty(shape, dtype=dtype, device=device),
        )

    @property
    def columns(self) -> int:
        """The number of columns there is room for."""
        return self.buffers["keys"].shape[2]

    @abc.abstractmethod
    def append(
        self, keys: Tensor, values: Tensor, context: BatchContext
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store new columns; returns keys and values to attend to, and `starts` among them.

        Raises:
            ConfigError: the cache has no room left.
        """

    @abc.abstractmethod
    def places(self, step: SlotStep) -> tuple[Tensor, Tensor]:
        """Where each slot stores its new column, and how many stored columns each then has."""

    def copy_row(self, row: int, target: int, columns: int) -> None:
        """Copy row `row`, which holds `columns` columns, to row `target`."""
        for buffer in self.buffers.values():
            buffer[target, :, :columns] = buffer[row, :, :columns]

    def reserve(self, capacity: int) -> None:
        """Make room for a text of `capacity` columns, keeping what is stored."""
        columns = self._columns_for(capacity)
        if columns <= self.columns:
            return
        for name, old in self.buffers.items():
            with torch.inference_mode(old.is_inference()):
                new = old.new_empty(*old.shape[:2], columns, old.shape[3])
                new[:, :, : old.shape[2]] = old  # a ring that may still grow has not wrapped yet
            self.buffers[name] = new

    def _columns_for(self, capacity: int) -> int:
        return capacity if self.window is None else min(capacity, self.window)

    def _require_room(self, end: int) -> None:
        if end > self.columns != self.window:
            raise ConfigError(
                f"cache: column {end} does not fit a capacity of {self.columns}; "
                "allocate the cache for prompt plus new tokens"
            )


class FullKV(KVState):
    """Every column; the only state of the family that grows with the text."""

    def append(
        self, keys: Tensor, values: Tensor, context: BatchContext
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store new columns; returns all columns up to now, without a copy."""
        end = context.offset + keys.shape[2]
        self._require_room(end)
        for name, new in (("keys", keys), ("values", values)):
            self.buffers[name][:, :, context.offset : end] = new
        keys, values = (self.buffers[name][:, :, :end] for name in ("keys", "values"))
        return keys, values, context.starts

    def places(self, step: SlotStep) -> tuple[Tensor, Tensor]:
        """The column itself, and all of them."""
        return step.columns_B, step.lengths_B

    def take_row(self, target: int, other: Self, row: int, start: int, end: int) -> None:
        """Copy columns `start` to `end`, all there are, of a row of another state to `target`."""
        for name, buffer in self.buffers.items():
            buffer[target, :, : end - start] = other.buffers[name][row, :, start:end]


class WindowKV(KVState):
    """A ring of the last `columns` columns: column c lies in slot c modulo its size."""

    def append(
        self, keys: Tensor, values: Tensor, context: BatchContext
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store new columns; returns those that the new queries can see.

        A chunk gets the older columns in order before its own. A single column may get the ring as
        it lies, since a softmax does not care for order: then every slot is visible.
        """
        T, size = keys.shape[2], self.columns
        self._require_room(context.offset + T)
        if T == 1:
            return self._append_one(keys, values, context)
        first, end = max(context.offset - size, 0), context.offset + T
        kept = min(T, size)
        slots = torch.arange(end - kept, end, device=keys.device) % size
        visible = []
        for name, new in (("keys", keys), ("values", values)):
            visible.append(torch.cat((self._in_order(name, context.offset), new), dim=2))
            self.buffers[name][:, :, slots] = new[:, :, T - kept :]
        return visible[0], visible[1], _shifted(context, first)

    def places(self, step: SlotStep) -> tuple[Tensor, Tensor]:
        """The slot of the ring, and at most as many columns as it has."""
        return step.in_ring(self.columns)

    def take_row(self, target: int, other: Self, row: int, start: int, end: int) -> None:
        """Copy columns `start` to `end`, all there are, of a row of another state to `target`."""
        kept = min(end - start, self.columns)
        slots = torch.arange(end - start - kept, end - start, device=self._device) % self.columns
        for name, buffer in self.buffers.items():
            columns = other.rows(row, 1)._in_order(name, end)
            buffer[target, :, slots] = columns[0, :, columns.shape[2] - kept :]

    @property
    def _device(self) -> torch.device:
        return self.buffers["keys"].device

    def _append_one(
        self, keys: Tensor, values: Tensor, context: BatchContext
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        slot, end = context.offset % self.columns, context.offset + 1
        for name, new in (("keys", keys), ("values", values)):
            self.buffers[name][:, :, slot : slot + 1] = new
        first = max(end - self.columns, 0)
        if context.max_start > first:  # some slots are padding: order matters to `starts`
            keys, values = (self._in_order(name, end) for name in ("keys", "values"))
            return keys, values, _shifted(context, first)
        keys, values = (self.buffers[name][:, :, :end] for name in ("keys", "values"))
        return keys, values, None

    def _in_order(self, name: str, end: int) -> Tensor:
        """The stored columns before column `end`, oldest first."""
        ring, slot = self.buffers[name], end % self.columns
        if end <= self.columns:
            return ring[:, :, :end]
        return torch.cat((ring[:, :, slot:], ring[:, :, :slot]), dim=2)


def _shifted(context: BatchContext, first: int) -> Tensor | None:
    """`starts` counted from column `first`; None once no row has padding from there on."""
    if context.starts is None or context.max_start <= first:
        return None
    return context.starts - first
