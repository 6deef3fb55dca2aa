"""The product with a gate, silu(a) * m: of the gated memory unit, of Mamba's output and of SwiGLU.

Written as two operations the product moves five tensors forwards, as one it moves three.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sambay.ops import registry
from sambay.ops.gate import triton

__all__ = ["gated_product"]


def gated_product(a: Tensor, m: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(a) * m in their dtype; both have one shape. Differentiable in both.

    Raises:
        BackendUnavailable: the named backend ("reference", "triton") cannot serve the call.
    """
    assert a.shape == m.shape, (a.shape, m.shape)
    return registry.choose("gated_product", backend, (a, m))(a, m)


def _reference(a: Tensor, m: Tensor) -> Tensor:
    return F.silu(a) * m


registry.register("gated_product", "reference", 0, _reference)
registry.register("gated_product", "triton", 20, triton.multiply, triton.why_unavailable)
