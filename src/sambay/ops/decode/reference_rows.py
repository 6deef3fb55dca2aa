"""What a decode step does between mixers and products, as its definition in torch, on any device.

They read no value on the host, so that a graph may hold them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def embed(tokens_B: Tensor, weight_VD: Tensor, factor: float) -> Tensor:
    """See `embed_rows`."""
    return _wide(F.embedding(tokens_B, weight_VD)) * factor


def norm(
    x_BD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor | None,
    eps: float,
    factor: float,
    centred: bool,
) -> Tensor:
    """See `norm_rows`: torch's own norms."""
    x = x_BD.to(weight_D.dtype)
    if centred:
        out = F.layer_norm(x, weight_D.shape, weight_D, bias_D, eps)
    else:
        out = F.rms_norm(x, weight_D.shape, weight_D, eps)
        out = out if bias_D is None else out + bias_D
    return out if factor == 1 else out * factor


def gate(gate_BF: Tensor, value_BF: Tensor) -> Tensor:
    """See `gate_rows`."""
    return F.silu(gate_BF) * value_BF


def add(x_BD: Tensor, y_BD: Tensor, factor: float) -> Tensor:
    """See `add_rows`."""
    return torch.add(x_BD, y_BD, alpha=factor)


def count(lengths_B: Tensor) -> None:
    """See `count_columns`."""
    lengths_B.add_(lengths_B > 0)


def places(lengths_B: Tensor, ring: int | None) -> tuple[Tensor, Tensor]:
    """See `slot_places`."""
    if ring is None:
        return lengths_B - 1, lengths_B
    columns_B = ((lengths_B - 1) % ring).where(lengths_B > 0, -1)
    return columns_B, lengths_B.clamp(max=ring)


def turns(columns_B: Tensor, frequencies_R: Tensor) -> tuple[Tensor, Tensor]:
    """See `rotary_turns`."""
    angles = columns_B.float()[:, None] * frequencies_R
    return angles.cos(), angles.sin()


def rotate(x_BHP: Tensor, cosines_BR: Tensor, sines_BR: Tensor) -> Tensor:
    """See `rotate_heads`."""
    first, second = _wide(x_BHP).chunk(2, dim=-1)
    c, s = cosines_BR[:, None], sines_BR[:, None]
    rotated = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
    return rotated.to(x_BHP.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
