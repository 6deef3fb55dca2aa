"""The two normalisations, applied to the residual stream in the dtype of their weights."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sambay.layers.roles import Role
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


_CLASSES = {Norm.RMS: RMSNorm, Norm.LAYER: LayerNorm}


def make_norm(config: ModelConfig) -> nn.Module:
    """The configured normalisation over the hidden size."""
    return _CLASSES[config.norm](config.hidden_size, config.norm_eps)
