"""What mixers are told in a decode step over slots, each of which stands at a column of its own.

A step takes one new token per slot. It reads nothing on the host and keeps every tensor in its
place, so that it can be captured once and replayed.

Shape letters: B slots, S columns there is room for.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple, TypeVar

from torch import Tensor

from sambay.layers.state import LayerState
from sambay.ops.decode import slot_places

T = TypeVar("T")


class SlotLayer(NamedTuple):
    """What one layer has in a decode step: its state, if it keeps any, and its constants.

    constants: what follows from the layer's parameters alone, computed once for all steps.
    """

    state: LayerState | None
    constants: Mapping[str, Tensor]


class SlotStep:
    """The places of the new tokens of one step.

    lengths_B: (B,) int64, the columns of every slot, its new one included; 0 in an idle slot.
    columns_B: (B,) int64, the column of the new token; -1 in an idle slot, where nothing is stored.
    """

    def __init__(self, lengths_B: Tensor) -> None:
        self.lengths_B = lengths_B
        self.columns_B, _ = slot_places(lengths_B)
        self._known: dict[Hashable, object] = {}

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """What `compute` gives, computed by the first layer of this step that asks for `key`."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]  # pyright: ignore[reportReturnType]

    def in_ring(self, size: int) -> tuple[Tensor, Tensor]:
        """Where a ring of `size` columns stores the new ones, and how many of its columns count."""

        return self.once(("ring", size), lambda: slot_places(self.lengths_B, size))
