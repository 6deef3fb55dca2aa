"""A decode step's attention and Mamba update by Triton kernels, on CUDA devices.

The floor is one pass over the visible keys and values; for differential attention both softmaxes,
their difference and its norm are part of that pass. Nothing is read on the host: the number of
parts follows from the capacity, and each row's visible columns are divided among all of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sambay.ops.triton.launch import interpreted, launch, power_of_two, processors
from sambay.ops.triton.launch import why_unavailable_untraced as why_unavailable

__all__ = ["attend", "attend_differential", "step_mamba", "store", "why_unavailable"]

COLUMNS = 64  # of a tile: keys and values of a pair of width 64 are 32 KiB, three in flight
PROGRAMS = 6  # per multiprocessor, of 4 warps each, to have enough bytes on the way
CHANNELS = 64  # of a program that updates states: 4 KiB of them
SMALLEST_DOT = 16  # rows and columns that a matrix product needs


def attend(
    q_BHP: Tensor, k_BKSP: Tensor, v_BKSP: Tensor, lengths_B: Tensor, scale: float
) -> Tensor:
    """See `decode_attention`."""
    B, H, P = q_BHP.shape
    sums, maxima, weights = _parts(q_BHP, k_BKSP, v_BKSP, lengths_B, scale, maps=1)
    out = q_BHP.new_empty(B, H, P)
    _merge(sums, maxima, weights, sums, sums, out, 0.0, 1.0, maps=1)
    return out


def attend_differential(
    q_BHP: Tensor,
    k_BKSP: Tensor,
    v_BKSP: Tensor,
    lengths_B: Tensor,
    weight: Tensor,
    norm_weight_2P: Tensor,
    scale: float,
    eps: float,
    factor: float,
) -> Tensor:
    """See `decode_differential_attention`."""
    B, H, P = q_BHP.shape
    sums, maxima, weights = _parts(q_BHP, k_BKSP, v_BKSP, lengths_B, scale, maps=2)
    out = q_BHP.new_empty(B, H * P)
    _merge(sums, maxima, weights, weight, norm_weight_2P.contiguous(), out, eps, factor, maps=2)
    return out


def store(
    keys_BKP: Tensor, values_BKP: Tensor, k_BKSP: Tensor, v_BKSP: Tensor, columns_B: Tensor
) -> None:
    """See `store_columns`."""
    keys, values = _dense(keys_BKP), _dense(values_BKP)
    assert k_BKSP.stride(3) == v_BKSP.stride(3) == 1, "a cache has the head dimension last"
    B, K, P = keys.shape
    launch(
        "decode_attention",
        "store_columns",
        (B,),
        keys,
        values,
        k_BKSP,
        v_BKSP,
        columns_B,
        K,
        *keys.stride()[:2],
        *values.stride()[:2],
        *k_BKSP.stride()[:3],
        *v_BKSP.stride()[:3],
        HEAD=P,
        BLOCK=power_of_two(K * P),
        num_warps=4,
    )


def step_mamba(
    u_BE: Tensor,
    conv_weight_EW: Tensor,
    conv_bias_E: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight_ER: Tensor,
    dt_bias_E: Tensor,
    A_log_EN: Tensor,
    D_E: Tensor,
    conv_state_BCE: Tensor,
    ssm_state_BEN: Tensor,
) -> Tensor:
    """See `mamba_step`: two kernels, and torch's products with the two projections between them."""
    assert ssm_state_BEN.is_contiguous(), "a state is advanced in place"
    assert conv_state_BCE.stride(2) == 1, "a state is advanced in place"
    B, E = u_BE.shape
    N, R = A_log_EN.shape[1], dt_proj_weight_ER.shape[1]
    u, x, y = _dense(u_BE), u_BE.new_empty(B, E), u_BE.new_empty(B, E)
    launch(
        "mamba_step",
        "conv_step",
        (-(-E // 256), B),
        u,
        conv_weight_EW.contiguous(),
        conv_bias_E.contiguous(),
        conv_state_BCE,
        x,
        E,
        u.stride(0),
        *conv_state_BCE.stride()[:2],
        WIDTH=conv_weight_EW.shape[1],
        BLOCK_E=256,
        num_warps=4,
    )
    projected = F.linear(x, x_proj_weight)
    delta = F.linear(projected[:, :R], dt_proj_weight_ER)
    launch(
        "mamba_step",
        "scan_step",
        (-(-E // CHANNELS), B),
        x,
        delta,
        A_log_EN.contiguous(),
        projected[:, R : R + N],
        projected[:, R + N :],
        D_E.contiguous(),
        dt_bias_E.contiguous(),
        x,  # no gate: the layer's memory is what comes before it
        ssm_state_BEN,
        y,
        E,
        x.stride(0),
        delta.stride(0),
        projected.stride(0),
        projected.stride(0),
        0,
        STATES=N,
        BLOCK_N=power_of_two(N),
        BLOCK_E=CHANNELS,
        HAS_GATE=False,
        num_warps=4,
    )
    return y


def _parts(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float, maps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(sums, maxima, weights) of every part of the columns, see the kernel `attend_part`."""
    # Products have the queries' dtype. The interpreter knows none of bfloat16 values.
    q = q.float() if interpreted() else q.to(torch.promote_types(q.dtype, k.dtype))
    q, k, v = _dense(q), _dense(k), _dense(v)
    B, H, P = q.shape
    K, S = k.shape[1:3]
    groups = K // maps
    parts = _number_of_parts(B * groups, S, q.device)
    sums = q.new_empty(B, groups, parts, maps * H // K, maps * P, dtype=torch.float32)
    maxima, weights = sums.new_empty(2, *sums.shape[:4])
    launch(
        "decode_attention",
        "attend_part",
        (parts, groups, B),
        q,
        k,
        v,
        lengths,
        sums,
        maxima,
        weights,
        groups,
        S,
        scale,
        *q.stride()[:2],
        *k.stride()[:3],
        *v.stride()[:3],
        GROUP=H // K,
        MAPS=maps,
        ROWS=max(power_of_two(maps * H // K), SMALLEST_DOT),
        HEAD=P,
        BLOCK_P=max(power_of_two(P), SMALLEST_DOT),
        BLOCK_S=COLUMNS,
        # bfloat16 products are exact; float32 ones keep all bits, as the other backends' do.
        PRECISION="ieee",
        num_warps=4,
        num_stages=3,
    )
    return sums, maxima, weights


def _number_of_parts(programs: int, capacity: int, device: torch.device) -> int:
    wanted = -(-PROGRAMS * processors(device) // programs)
    return max(min(wanted, -(-capacity // (2 * COLUMNS)), 64), 1)


def _merge(
    sums: Tensor,
    maxima: Tensor,
    weights: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    out: Tensor,
    eps: float,
    factor: float,
    maps: int,
) -> None:
    B, groups, parts, rows, width = sums.shape
    launch(
        "decode_attention",
        "merge_parts",
        (rows // maps, groups, B),
        sums,
        maxima,
        weights,
        weight,
        norm_weight,
        out,
        parts,
        eps,
        factor,
        GROUP=rows // maps,
        MAPS=maps,
        HEAD=width // maps,
        BLOCK_E=power_of_two(width),
        BLOCK_PARTS=power_of_two(parts),
        num_warps=4,
    )


def _dense(tensor: Tensor) -> Tensor:
    """The tensor, its last dimension's values beside each other."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
