"""Ways to run a block in training that trade memory for computing parts of it twice."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from sambay.layers.context import BatchContext, SharedStates
from sambay.layers.state import LayerState
from sambay.model.decoder import BlockCall, call_block

Recompute = Literal["none", "selective", "full"]


def _keep_products(context: object, op: object, *args: object, **options: object) -> object:
    """Keep the results of matrix products and scans, the bulk of the work of a block."""
    kept = op in _PRODUCTS or str(op).startswith(_SCANS)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.linear.default,
}
_SCANS = ("sambay.selective_scan", "sambay.state_space_dual", "sambay.gated_delta")


def _call_recomputed(
    block: nn.Module,
    x: Tensor,
    context: BatchContext,
    shared: SharedStates,
    state: LayerState | None,
) -> tuple[Tensor, SharedStates]:
    return checkpoint(block, x, context, shared, state, use_reentrant=False)


def _call_half_recomputed(
    block: nn.Module,
    x: Tensor,
    context: BatchContext,
    shared: SharedStates,
    state: LayerState | None,
) -> tuple[Tensor, SharedStates]:
    choice = functools.partial(create_selective_checkpoint_contexts, _keep_products)
    return checkpoint(block, x, context, shared, state, use_reentrant=False, context_fn=choice)


CALLS: Mapping[Recompute, BlockCall] = {
    "none": call_block,
    "full": _call_recomputed,
    "selective": _call_half_recomputed,
}
