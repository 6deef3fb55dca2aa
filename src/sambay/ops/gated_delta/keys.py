"""Unit keys and queries for the gated delta rule."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6  # keeps a zero vector at zero, with a finite gradient


def l2_normalise(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dimension, in x's dtype, computed in float32 or more.

    (arXiv 2412.06464, section 3.4: q and k of the gated delta rule.)
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + EPSILON)).to(x.dtype)
