"""Few rows times weights of 4 or 8 bits of which each group in a row has a scale.

Groups are what keeps 4 bits usable: a large weight widens the steps of its 32 neighbours, not those
of its whole row. Two weights of 4 bits lie in a byte, in the order in which a kernel can unpack
them with the fewest instructions; `pack_int4` is what writes it. Shape letters: B rows, D input and
F output features, G groups of a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sambay.ops import registry
from sambay.ops.decode.gradients import without_gradients
from sambay.ops.decode.native import serves_decoding, threads_for
from sambay.ops.native.library import rows_of
from sambay.ops.native.recording import call

BLOCK = 32
"""Weights of a block, which are packed together: groups are whole blocks."""

_WORDS = 8  # of a block: the four numbers in word l are its weights l, 8 + l, 16 + l and 24 + l
_ADDED = 8  # makes a number of 0 to 15 of each weight


@without_gradients
def grouped_linear(
    x_BD: Tensor,
    weight: Tensor,
    scale_FG: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """x @ (scale * weight)^T + bias for few rows, (B, F) in x's dtype; not differentiable.

    weight: int8 of (F, D), or uint8 of (F, D / 2) as `pack_int4` makes it.
    scale_FG: float32 or bfloat16, of each of the G groups of a row; D / G is a multiple of 32.

    Raises:
        BackendUnavailable: the named backend cannot serve this call.
    """
    size, groups = x_BD.shape[1], scale_FG.shape[1]
    assert weight.dtype in (torch.int8, torch.uint8), weight.dtype
    assert weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1) == size, weight.shape
    assert scale_FG.shape[0] == weight.shape[0], (scale_FG.shape, weight.shape)
    assert size % (BLOCK * groups) == 0, (size, groups)
    linear = registry.choose("grouped_linear", backend, x_BD)
    return linear(x_BD, weight, scale_FG, bias)


def pack_int4(weight_FD: Tensor) -> Tensor:
    """Integers from -8 to 7, two in a byte: (F, D / 2) uint8; D is a multiple of 32."""
    numbers = (weight_FD + _ADDED).to(torch.uint8).unflatten(1, (-1, 2, 2, _WORDS))
    pairs = numbers[:, :, :, 0] | numbers[:, :, :, 1] << 4  # (F, block, byte of a word, word)
    return pairs.transpose(2, 3).flatten(1)


def unpack_int4(packed: Tensor) -> Tensor:
    """What was packed, (F, D) int8."""
    pairs = packed.unflatten(1, (-1, _WORDS, 2)).transpose(2, 3)
    numbers = torch.stack((pairs & 15, pairs >> 4), dim=3)
    return numbers.flatten(1).to(torch.int8) - _ADDED


def widen(weight_FD: Tensor, scale_FG: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that integers and the scales of their groups stand for, (F, D) in that dtype."""
    grouped = weight_FD.to(dtype).unflatten(1, (scale_FG.shape[1], -1))
    return grouped.mul_(scale_FG.to(dtype)[:, :, None]).flatten(1)


def linear_reference(x_BD: Tensor, weight: Tensor, scale_FG: Tensor, bias: Tensor | None) -> Tensor:
    """See `grouped_linear`: the whole matrix, then torch's own product."""
    compute = torch.promote_types(x_BD.dtype, torch.float32)
    whole_FD = unpack_int4(weight) if weight.dtype == torch.uint8 else weight
    bias = None if bias is None else bias.to(compute)
    wide_FD = widen(whole_FD, scale_FG, compute)
    return F.linear(x_BD.to(compute), wide_FD, bias).to(x_BD.dtype)


def linear_native(x_BD: Tensor, weight: Tensor, scale_FG: Tensor, bias: Tensor | None) -> Tensor:
    """See `grouped_linear`: C++, each weight unpacked where it is multiplied."""
    x, weight, scale = rows_of(x_BD), rows_of(weight), rows_of(scale_FG)
    if scale.dtype not in (torch.float32, torch.bfloat16):
        scale = scale.float()
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    rows, size = x.shape
    features, groups = scale.shape
    y = x.new_empty(rows, features)
    call(
        "sambay_grouped_linear",
        x,
        x.stride(0),
        weight,
        weight.stride(0),
        scale,
        scale.stride(0),
        bias,
        y,
        rows,
        size,
        features,
        size // groups,
        4 if weight.dtype == torch.uint8 else 8,
        x.dtype == torch.bfloat16,
        scale.dtype == torch.bfloat16,
        threads_for(weight.nbytes),
    )
    return y


registry.register("grouped_linear", "reference", 0, linear_reference)
registry.register("grouped_linear", "native", 20, linear_native, serves_decoding)
