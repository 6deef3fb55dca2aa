"""The product with a gate by a Triton kernel, on CUDA devices, as a torch operator.

The floor is the bytes of three tensors forwards and five backwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sambay.ops.second_derivative import refuse_second_derivative
from sambay.ops.triton import launch

BLOCK = 1024

_library = torch.library.Library("sambay", "FRAGMENT")
_library.define("gated_product_triton(Tensor a, Tensor m) -> Tensor")
_library.define("gated_product_triton_backward(Tensor dy, Tensor a, Tensor m) -> (Tensor, Tensor)")


def why_unavailable(call: tuple[Tensor, Tensor] | None) -> str | None:
    """None if the kernel can serve a call with this (a, m), else the reason and the remedy."""
    if call is not None and call[0].dtype != call[1].dtype:
        return "it takes a gate and a value of one dtype"
    return launch.why_unavailable(None if call is None else call[0])


def _forward(a: Tensor, m: Tensor) -> Tensor:
    y = a.new_empty(a.shape)
    a, m = _rows(a), _rows(m)
    _launch("gate_forward", a, m, y, a.shape[1], a.stride(0), m.stride(0))
    return y


def _backward(dy: Tensor, a: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    da, dm = a.new_empty(a.shape), m.new_empty(m.shape)
    dy, a, m = _rows(dy), _rows(a), _rows(m)
    strides = (dy.stride(0), a.stride(0), m.stride(0))
    _launch("gate_backward", dy, a, m, da, dm, a.shape[1], *strides)
    return da, dm


def _launch(name: str, first: Tensor, *others: Any) -> None:
    rows, columns = first.shape
    if first.numel():
        grid = (rows, -(-columns // BLOCK))
        launch.launch("elementwise", name, grid, first, *others, BLOCK=BLOCK, num_warps=4)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor as (rows, columns), a view where its strides allow."""
    return (tensor if tensor.stride(-1) == 1 else tensor.contiguous()).flatten(0, -2)


_library.impl("gated_product_triton", _forward, "CompositeExplicitAutograd")
_library.impl("gated_product_triton_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("sambay::gated_product_triton", lib=_library)
def _(a, m):
    return a.new_empty(a.shape)


@torch.library.register_fake("sambay::gated_product_triton_backward", lib=_library)
def _(dy, a, m):
    return a.new_empty(a.shape), m.new_empty(m.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.sambay.gated_product_triton_backward.default(dy, *ctx.saved_tensors)


torch.library.register_autograd(
    "sambay::gated_product_triton", _differentiate, setup_context=_keep, lib=_library
)
_refuse = refuse_second_derivative("gated_product's triton backend", "reference")
torch.library.register_autograd("sambay::gated_product_triton_backward", _refuse, lib=_library)


def multiply(a: Tensor, m: Tensor) -> Tensor:
    """silu(a) * m of `gated_product`."""
    return torch.ops.sambay.gated_product_triton.default(a, m)
