"""The normalisations of the residual stream, and one beside a gate, in their weights' dtype."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sambay.layers.roles import Role
from sambay.ops.decode import norm_rows
from sambay.spec import ModelConfig, Norm


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    roles: ClassVar = {"weight": Role.VECTOR}

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) in any dtype to (..., size) in the weight's dtype."""
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)

    def decode(self, x_BD: Tensor, factor: float = 1.0) -> Tensor:
        """(B, D) in any dtype to `factor` times what `forward` gives, for one token per slot."""
        return norm_rows(x_BD, self.weight, eps=self.eps, factor=factor)


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * weight + bias over the last dimension."""

    roles: ClassVar = {"weight": Role.VECTOR, "bias": Role.VECTOR}

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) in any dtype to (..., size) in the weight's dtype."""
        x = x.to(self.weight.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def decode(self, x_BD: Tensor, factor: float = 1.0) -> Tensor:
        """(B, D) in any dtype to `factor` times what `forward` gives, for one token per slot."""
        return norm_rows(x_BD, self.weight, self.bias, eps=self.eps, centred=True, factor=factor)


class GatedRMSNorm(nn.Module):
    """The RMSNorm and the gate at the end of a recurrent mixer, in either order.

    After the gate is RMSNorm(y * silu(z)), before it RMSNorm(y) * silu(z) (arXiv 2507.06607,
    appendix B). The last dimension is normalised, so a norm within each head takes (..., H, P).
    """

    roles: ClassVar = {"weight": Role.VECTOR}

    def __init__(self, size: int, eps: float, *, before_gate: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.before_gate = before_gate

    def forward(self, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """(normed and gated, what the gate multiplied), for y and z of one shape (..., size).

        What the gate multiplied has y's dtype: y itself, or the normed y if the norm comes first.
        """
        dtype = self.weight.dtype
        if self.before_gate:
            y = self._normed(y.to(dtype)).to(y.dtype)
            return y * F.silu(z), y
        return self._normed(y.to(dtype) * F.silu(z.to(dtype))), y

    def _normed(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


_CLASSES = {Norm.RMS: RMSNorm, Norm.LAYER: LayerNorm}


def make_norm(config: ModelConfig) -> RMSNorm | LayerNorm:
    """The configured normalisation over the hidden size."""
    return _CLASSES[config.norm](config.hidden_size, config.norm_eps)
