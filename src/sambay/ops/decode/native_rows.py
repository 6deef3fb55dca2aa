"""What a decode step does with its few rows between mixers and products, in C++ on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from sambay.ops.decode import reference_rows as reference
from sambay.ops.decode.native import threads_for, why_unseen
from sambay.ops.native.library import rows_of, why_unavailable
from sambay.ops.native.recording import call

_BFLOAT16 = torch.bfloat16
_TYPES = (torch.float32, torch.bfloat16)


def serves_places(lengths_B: Tensor | None) -> str | None:
    """None if the kernels can serve an operation on these lengths, else the reason."""
    if lengths_B is not None:
        if lengths_B.device.type != "cpu":
            return f"it computes on the CPU, the tensors are on {lengths_B.device.type}"
        if lengths_B.dtype != torch.int64 or not lengths_B.is_contiguous():
            return "it takes contiguous int64"
    return why_unseen() or why_unavailable()


def embed(tokens_B: Tensor, weight_VD: Tensor, factor: float) -> Tensor:
    """See `embed_rows`."""
    if tokens_B.dtype != torch.int64:
        return reference.embed(tokens_B, weight_VD, factor)
    tokens, table = tokens_B.contiguous(), rows_of(weight_VD)
    out = table.new_empty(len(tokens), table.shape[1], dtype=torch.float32)
    call(
        "sambay_embed_rows",
        tokens,
        table,
        table.stride(0),
        out,
        *out.shape,
        table.shape[0],
        table.dtype == _BFLOAT16,
        factor,
    )
    return out


def norm(
    x_BD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor | None,
    eps: float,
    factor: float,
    centred: bool,
) -> Tensor:
    """See `norm_rows`."""
    if x_BD.dtype not in _TYPES or (bias_D is not None and bias_D.dtype != weight_D.dtype):
        return reference.norm(x_BD, weight_D, bias_D, eps, factor, centred)
    x, weight = rows_of(x_BD), weight_D.contiguous()
    bias = None if bias_D is None else bias_D.contiguous()
    out = weight.new_empty(x.shape)
    call(
        "sambay_norm_rows",
        x,
        x.stride(0),
        weight,
        bias,
        out,
        *x.shape,
        x.dtype == _BFLOAT16,
        weight.dtype == _BFLOAT16,
        centred,
        eps,
        factor,
    )
    return out


def gate(gate_BF: Tensor, value_BF: Tensor) -> Tensor:
    """See `gate_rows`."""
    if value_BF.dtype != gate_BF.dtype:
        return reference.gate(gate_BF, value_BF)
    gates, values = rows_of(gate_BF), rows_of(value_BF)
    out = gates.new_empty(gates.shape)
    call(
        "sambay_gate_rows",
        gates,
        gates.stride(0),
        values,
        values.stride(0),
        out,
        *gates.shape,
        gates.dtype == _BFLOAT16,
        threads_for(out.numel() * 4),  # an exponential costs as much as reading four bytes
    )
    return out


def add(x_BD: Tensor, y_BD: Tensor, factor: float) -> Tensor:
    """See `add_rows`."""
    if x_BD.dtype != torch.float32 or y_BD.dtype not in _TYPES:
        return reference.add(x_BD, y_BD, factor)
    x, y = x_BD.contiguous(), y_BD.contiguous()
    out = x.new_empty(x.shape)
    call("sambay_add_rows", x, y, out, out.numel(), y.dtype == _BFLOAT16, factor)
    return out


def count(lengths_B: Tensor) -> None:
    """See `count_columns`."""
    call("sambay_count_columns", lengths_B, len(lengths_B))


def places(lengths_B: Tensor, ring: int | None) -> tuple[Tensor, Tensor]:
    """See `slot_places`."""
    columns, seen = lengths_B.new_empty(2, len(lengths_B)).unbind()
    call("sambay_slot_places", lengths_B, ring or 0, columns, seen, len(lengths_B))
    return columns, seen


def turns(columns_B: Tensor, frequencies_R: Tensor) -> tuple[Tensor, Tensor]:
    """See `rotary_turns`."""
    columns, frequencies = columns_B.contiguous(), frequencies_R.contiguous()
    shape = (len(columns), len(frequencies))
    cosines, sines = frequencies.new_empty(2, *shape).unbind()
    call("sambay_rotary_turns", columns, frequencies, cosines, sines, *shape)
    return cosines, sines


def rotate(x_BHP: Tensor, cosines_BR: Tensor, sines_BR: Tensor) -> Tensor:
    """See `rotate_heads`."""
    x, cosines, sines = rows_of(x_BHP), cosines_BR.contiguous(), sines_BR.contiguous()
    out = x.new_empty(x.shape)
    call(
        "sambay_rotate_heads",
        x,
        *x.stride()[:2],
        cosines,
        sines,
        out,
        *x.shape[:2],
        cosines.shape[1],
        x.dtype == _BFLOAT16,
    )
    return out
