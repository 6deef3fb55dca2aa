"""The walk through the blocks, shared by every model class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor, nn

from sambay.layers.context import BatchContext, SharedStates
from sambay.layers.state import LayerState


class BlockCall(Protocol):
    """How a block is run: directly, checkpointed, observed."""

    def __call__(
        self,
        block: nn.Module,
        x_BTD: Tensor,
        context: BatchContext,
        shared: SharedStates,
        state: LayerState | None,
        /,
    ) -> tuple[Tensor, SharedStates]: ...


def run_blocks(
    blocks: Iterable[nn.Module],
    states: Sequence[LayerState | None],
    x_BTD: Tensor,
    context: BatchContext,
    *,
    split: int,
    keep: int | None,
    call: BlockCall,
) -> Tensor:
    """(B, T, D) through all blocks; the last `keep` columns of the result, or all.

    split: the index of the last block that keeps state. Behind it only the kept columns are
        computed (linear prefill, arXiv 2507.06607, section 2).
    """
    shared = SharedStates()
    selecting = context.keeping(keep)
    for index, (block, state) in enumerate(zip(blocks, states, strict=True)):
        if index == split:
            context = selecting
        x_BTD, shared = call(block, x_BTD, context, shared, state)
        if index == split:
            context = selecting.narrowed()
    return x_BTD


def call_block(
    block: nn.Module,
    x_BTD: Tensor,
    context: BatchContext,
    shared: SharedStates,
    state: LayerState | None,
) -> tuple[Tensor, SharedStates]:
    """The plain call."""
    return block(x_BTD, context, shared, state)
