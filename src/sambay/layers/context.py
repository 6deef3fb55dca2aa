"""What every mixer is told about the batch, and what layers hand to later layers.

The one padding convention is left padding: all rows of a batch end together. So "the last T
columns" describes cached chunks, decode steps and the last-token prefill alike, and states after a
chunk need no gathering.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor


class SharedStates(NamedTuple):
    """Values published by a layer and read by later layers of the same forward.

    They are plain values, never kept in the cache or on a module, so training, checkpointed and
    cached forwards see the same numbers.

    memory: (B, T, memory_size), read by gated memory units.
    keys, values: (B, K, S, P), all columns up to now, read by cross-attention.
    """

    memory: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class BatchContext:
    """The columns of one forward.

    offset: columns already in the cache; the first column of this forward has this number.
    num_columns: T.
    starts: (B,) int64, the first real column of each row; None without padding.
    max_start: the largest of `starts`, on the host.
    segments: (B, T) int32, document numbers of packed rows; None otherwise.
    keep: how many of the last columns a mixer should return; None for all.
    """

    offset: int
    num_columns: int
    starts: Tensor | None = None
    max_start: int = 0
    segments: Tensor | None = None
    keep: int | None = None

    def select(self, x: Tensor) -> Tensor:
        """The columns of x (B, T, ...) whose outputs are wanted."""
        return x if self.keep is None else x[:, x.shape[1] - self.keep :]

    def keeping(self, keep: int | None) -> BatchContext:
        """The same columns, of which only the last `keep` are wanted as outputs."""
        return dataclasses.replace(self, keep=keep)

    def narrowed(self) -> BatchContext:
        """The context of the layers behind the selection, which see only the kept columns."""
        if self.keep is None:
            return self
        first = self.offset + self.num_columns - self.keep
        return dataclasses.replace(self, offset=first, num_columns=self.keep, keep=None)

    def to(self, device: torch.device | str) -> BatchContext:
        """The same context with its tensors on another device."""
        return dataclasses.replace(
            self,
            starts=None if self.starts is None else self.starts.to(device),
            segments=None if self.segments is None else self.segments.to(device),
        )

    def positions(self, device: torch.device) -> Tensor:
        """(B or 1, T) int64: the place of each column in its own row, counted without padding."""
        columns = torch.arange(self.offset, self.offset + self.num_columns, device=device)[None]
        return columns if self.starts is None else (columns - self.starts[:, None]).clamp(min=0)

    def padding(self, device: torch.device) -> Tensor | None:
        """(B, T, 1) bool, True on padding columns; None when this forward has none."""
        if self.starts is None or self.offset >= self.max_start:
            return None
        columns = torch.arange(self.offset, self.offset + self.num_columns, device=device)
        return (columns < self.starts[:, None])[..., None]

    def resets(self) -> Tensor | None:
        """(B, T) bool, True where a document starts inside a row; None without packing."""
        if self.segments is None:
            return None
        starts = torch.zeros_like(self.segments, dtype=torch.bool)
        starts[:, 1:] = self.segments[:, 1:] != self.segments[:, :-1]
        return starts
