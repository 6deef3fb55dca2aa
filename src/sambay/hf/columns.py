"""From transformers' masks and positions to the columns our mixers expect.

Our mixers know one padding: on the left, so that all rows of a batch end together. Rows that are
padded elsewhere are moved there before the blocks and back afterwards.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from sambay.errors import ConfigError
from sambay.layers.context import BatchContext


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of one call.

    source: token ids (B, T) or embeddings (B, T, D), moved if rows had to move.
    order: (B, T), the column each place was taken from; None if nothing moved.
    """

    source: Tensor
    context: BatchContext
    order: Tensor | None = None

    def restore(self, h_BTD: Tensor) -> Tensor:
        """Every column at its own place again; a selection of columns is returned as it is."""
        if self.order is None or h_BTD.shape[1] != self.order.shape[1]:
            return h_BTD
        back = self.order.to(h_BTD.device).argsort(dim=1)
        return h_BTD.gather(1, back[..., None].expand_as(h_BTD))


def read_columns(
    source: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    offset: int,
    cache: Any,
) -> Columns:
    """The columns of a call with `offset` columns in the cache.

    source: token ids (B, T) or embeddings (B, T, D).
    attention_mask: (B, offset + T), 0 on padding, or None.
    position_ids: (B or 1, T) or None.

    Raises:
        ConfigError: a mask of another shape, or padding between the real columns of a cached row.
    """
    B, T = source.shape[:2]
    if T == 0:
        raise ConfigError("input_ids has no columns; give at least one token")
    if attention_mask is None:
        segments = None
        if position_ids is not None and cache is None and T > 1:
            segments = _documents(position_ids, B)
        return Columns(source, BatchContext(offset, T, segments=segments))
    _check_mask(attention_mask, B, offset, T)
    mask = attention_mask.to(source.device) != 0
    starts = (~mask).sum(1)
    max_start = int(starts.max())
    if max_start == 0:
        return Columns(source, BatchContext(offset, T))
    context = BatchContext(offset, T, starts, max_start)
    before, new = mask[:, :offset], mask[:, offset:]
    started = before.any(1) if offset else torch.zeros_like(mask[:, 0])
    if bool((started & ~new.all(1)).any()):
        raise ConfigError(
            "attention_mask: a row has padding behind columns that are already in the cache; pad "
            "batches on the left to continue them in several calls"
        )
    if T == 1 or not bool((new[:, :-1] & ~new[:, 1:]).any()):
        return Columns(source, context)
    order = torch.sort(new.byte(), dim=1, stable=True).indices
    index = order if source.dim() == 2 else order[..., None].expand_as(source)
    return Columns(source.gather(1, index), context, order)


def _check_mask(mask: Tensor, B: int, offset: int, T: int) -> None:
    if mask.dim() != 2:
        raise ConfigError(
            f"attention_mask has shape {tuple(mask.shape)}; give (batch, columns) with 0 on "
            "padding, attention patterns are the model's own"
        )
    if mask.shape != (B, offset + T):
        held = f" ({offset} in the cache and {T} new)" if offset else ""
        raise ConfigError(
            f"attention_mask has shape {tuple(mask.shape)}, expected {(B, offset + T)}{held}"
        )


def _documents(position_ids: Tensor, B: int) -> Tensor | None:
    """(B, T) int32 document numbers if positions start again somewhere, else None."""
    breaks = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not bool(breaks.any()):
        return None
    first = torch.zeros_like(breaks[:, :1])
    return torch.cat((first, breaks), dim=1).cumsum(1).to(torch.int32).expand(B, -1)
