"""Linear maps that read their weight at the speed of memory where few rows meet it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sambay.layers.quantised import multiply_rows
from sambay.ops.decode import skinny_linear

MOST_ROWS = 32
"""Up to so many rows a product is over when its weight has been read."""


class Linear(nn.Linear):
    """What `nn.Linear` computes; a few rows on a CPU, without gradients, by `skinny_linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) to (..., F)."""
        rows = None
        if _is_skinny(input):
            rows = _multiplied(self, input.reshape(-1, self.in_features))
        if rows is None:
            return F.linear(input, self.weight, self.bias)
        return rows.view(*input.shape[:-1], self.out_features)


class ResidualProjection(Linear):
    """A linear map whose output is added to the residual stream.

    It computes what `nn.Linear` does. It is a class of its own because initialisation treats these
    matrices differently (arXiv 2507.06607, table 6).
    """


def _is_skinny(x: Tensor) -> bool:
    """Whether a product with these rows, (..., D), is only a reading of the weight."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    skinny = 0 < x.numel() <= MOST_ROWS * x.shape[-1]
    return skinny and type(x) is Tensor and not torch.is_autocast_enabled("cpu")


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
