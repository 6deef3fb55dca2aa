"""Linear maps that read their weight at the speed of memory where few rows meet it.

Many rows in bfloat16 are multiplied in float32 on processors that know nothing else: there torch
takes five times as long (1,024 rows, AVX2), an element at a time.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sambay.layers.quantised import multiply_rows, rows_in_float32
from sambay.ops.decode import skinny_linear

MOST_ROWS = 32
"""Up to so many rows a product is over when its weight has been read."""

_WIDENED = 1 << 22
"""Weights that are float32 at a time, few enough to stay in a cache."""


class Linear(nn.Linear):
    """What `nn.Linear` computes; on a CPU without gradients in the ways of this module."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) to (..., F)."""
        rows = None
        if _is_inference(input):
            if 0 < input.numel() <= MOST_ROWS * input.shape[-1]:
                rows = _multiplied(self, input.reshape(-1, self.in_features))
            elif input.dtype == torch.bfloat16 and not _multiplies_bfloat16():
                rows = _widened(self, input.reshape(-1, self.in_features))
        if rows is None:
            return F.linear(input, self.weight, self.bias)
        return rows.view(*input.shape[:-1], self.out_features)


class ResidualProjection(Linear):
    """A linear map whose output is added to the residual stream.

    It computes what `nn.Linear` does. It is a class of its own because initialisation treats these
    matrices differently (arXiv 2507.06607, table 6).
    """


def _is_inference(x: Tensor) -> bool:
    """Whether a product with x on the CPU is nothing but its numbers."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    return type(x) is Tensor and not torch.is_autocast_enabled("cpu")


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Whether torch has products of bfloat16 for this processor, or any that it calls so."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is None or not torch.backends.mkldnn.is_available() or supported()


def _widened(linear: nn.Linear, x_BD: Tensor) -> Tensor | None:
    """The product in float32, rounded once, (B, F) in bfloat16; None for weights of other kinds."""
    weight, bias = linear.weight, linear.bias
    if weight.is_meta or weight.dtype != torch.bfloat16:
        return None
    is_bare = type(weight) is nn.Parameter
    wide_BD, step = x_BD.float(), max(_WIDENED // x_BD.shape[1], 1)
    out_BF = x_BD.new_empty(len(x_BD), linear.out_features)
    for first in range(0, linear.out_features, step):
        some = slice(first, first + step)
        rows = weight[some].float() if is_bare else rows_in_float32(weight, some)
        if rows is None:
            return None
        out_BF[:, some] = F.linear(wide_BD, rows, None if bias is None else bias[some].float())
    return out_BF


def is_plain(linear: nn.Module) -> bool:
    """Whether a map is nothing but a weight and a bias, and they are there.

    No adapter, not quantised, and nobody hooked its call: accelerate, say, leaves weights on the
    meta device and loads them when the module is called.
    """
    return _is_bare(linear) and type(linear.weight) is nn.Parameter and not linear.weight.is_meta


def few_rows(linear: nn.Module, x_BD: Tensor) -> Tensor:
    """(B, D) to (B, F) by a linear map, where rows are slots: without gradients.

    On a CPU a plain map, also one whose weight torchao has quantised, reads its weight at the speed
    of memory; any other map is simply called.
    """
    if x_BD.device.type == "cpu" and len(x_BD) <= MOST_ROWS and _is_bare(linear):
        rows = _multiplied(linear, x_BD)  # pyright: ignore
        if rows is not None:
            return rows
    return linear(x_BD)


def _is_bare(linear: nn.Module) -> bool:
    """Whether calling a module does nothing but multiply by its weight, whatever that is."""
    return (
        type(linear) in (nn.Linear, Linear, ResidualProjection)
        and "forward" not in linear.__dict__
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
    )


def _multiplied(linear: nn.Linear, x_BD: Tensor) -> Tensor | None:
    """(B, F) by one of the kernels for few rows; None if none reads weights of this kind."""
    weight = linear.weight
    if type(weight) is not nn.Parameter:
        return multiply_rows(x_BD, weight, linear.bias)
    return None if weight.is_meta else skinny_linear(x_BD, weight, linear.bias)
