"""One row of every sequence, such as the last token's, whose place is known on the device only."""

from __future__ import annotations

import torch
from torch import Tensor

from sambay.ops import registry
from sambay.ops.triton import launch

_BLOCK = 1024


@torch.no_grad()
def gather_rows(x_BTD: Tensor, places_B: Tensor, *, backend: str | None = None) -> Tensor:
    """x[b, places[b]] for every b, (B, D); places are int32 or int64 and within 0..T-1.

    Raises:
        BackendUnavailable: the named backend ("reference", "triton") cannot serve the call.
    """
    assert places_B.shape == x_BTD.shape[:1], (places_B.shape, x_BTD.shape)
    return registry.choose("gather_rows", backend, x_BTD)(x_BTD, places_B)


def _reference(x_BTD: Tensor, places_B: Tensor) -> Tensor:
    return x_BTD[torch.arange(len(places_B), device=x_BTD.device), places_B.long()]


def _gather(x_BTD: Tensor, places_B: Tensor) -> Tensor:
    x = x_BTD if x_BTD.stride(2) == 1 else x_BTD.contiguous()
    B, _, D = x.shape
    y = x.new_empty(B, D)
    grid = (B, -(-D // _BLOCK))
    strides = x.stride()[:2]
    launch.launch(
        "elementwise", "gather_rows", grid, x, places_B, y, D, *strides, BLOCK=_BLOCK, num_warps=4
    )
    return y


registry.register("gather_rows", "reference", 0, _reference)
registry.register("gather_rows", "triton", 20, _gather, launch.why_unavailable_untraced)
