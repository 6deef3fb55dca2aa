"""The operations of a decode step as their definitions, in torch, on any device.

They compute in float32, or in float64 for float64 inputs, and read no value on the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sambay.ops.causal_conv.step import step_reference as conv_step
from sambay.ops.selective_scan.step import step_reference as scan_step


def attend(
    q_BHP: Tensor, k_BKSP: Tensor, v_BKSP: Tensor, lengths_B: Tensor, scale: float
) -> Tensor:
    """See `decode_attention`: one dense map per head."""
    maps_BKGS, compute = _maps(q_BHP, k_BKSP, lengths_B, scale), _compute_dtype(q_BHP)
    return (maps_BKGS @ _seen(v_BKSP, lengths_B, compute)).view(q_BHP.shape).to(q_BHP.dtype)


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
    """See `decode_differential_attention`: both maps of every pair, their difference, its norm."""
    B, H, P = q_BHP.shape
    K, S = k_BKSP.shape[1:3]
    group, compute = H // K, _compute_dtype(q_BHP)
    # (pair, member of group, map) -> (pair, map, member): then plain grouped heads apply.
    q = q_BHP.reshape(B, K // 2, group, 2, P).transpose(2, 3).reshape(B, H, P)
    maps = _maps(q, k_BKSP, lengths_B, scale).view(B, K // 2, 2, group, S)
    difference = maps[:, :, 0] - weight.to(compute) * maps[:, :, 1]
    values = _seen(v_BKSP, lengths_B, compute).view(B, K // 2, 2, S, P)
    out = difference[:, :, None] @ values  # (B, pair, half of the value, member, P)
    out = out.transpose(2, 3).reshape(B, H // 2, 2 * P)
    out = F.rms_norm(out, (2 * P,), norm_weight_2P.to(compute), eps) * factor
    return out.view(B, H * P).to(q_BHP.dtype)


def store(
    keys_BKP: Tensor, values_BKP: Tensor, k_BKSP: Tensor, v_BKSP: Tensor, columns_B: Tensor
) -> None:
    """See `store_columns`: an idle row writes back what column 0 holds."""
    rows = torch.arange(len(columns_B), device=columns_B.device)
    columns, idle = columns_B.clamp(min=0).long(), (columns_B < 0)[:, None, None]
    for new, cache in ((keys_BKP, k_BKSP), (values_BKP, v_BKSP)):
        cache[rows, :, columns] = torch.where(idle, cache[rows, :, columns], new.to(cache.dtype))


def linear(
    x_BD: Tensor, weight_FD: Tensor, bias: Tensor | None, scale_F: Tensor | None = None
) -> Tensor:
    """See `skinny_linear`: torch's own product."""
    if x_BD.dtype == weight_FD.dtype:
        return F.linear(x_BD, weight_FD, bias)
    compute = torch.promote_types(x_BD.dtype, torch.float32)
    if weight_FD.is_floating_point():
        compute = torch.promote_types(x_BD.dtype, weight_FD.dtype)
    weight = weight_FD.to(compute)
    if scale_F is not None:
        weight = weight * scale_F.to(compute)[:, None]
    bias = None if bias is None else bias.to(compute)
    return F.linear(x_BD.to(compute), weight, bias).to(x_BD.dtype)


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
    """See `mamba_step`: its parts one after another."""
    N, R = A_log_EN.shape[1], dt_proj_weight_ER.shape[1]
    x_BE = conv_step(u_BE, conv_weight_EW, conv_bias_E, conv_state_BCE)
    dt, B, C = F.linear(x_BE, x_proj_weight).split((R, N, N), dim=-1)
    delta = F.linear(dt, dt_proj_weight_ER)
    return scan_step(x_BE, delta, -torch.exp(A_log_EN), B, C, D_E, dt_bias_E, ssm_state_BEN)


def _maps(q_BHP: Tensor, k_BKSP: Tensor, lengths_B: Tensor, scale: float) -> Tensor:
    """The probabilities, (B, K, H / K, S); all zero in rows of length 0."""
    B, H, P = q_BHP.shape
    K, compute = k_BKSP.shape[1], _compute_dtype(q_BHP)
    keys = _seen(k_BKSP, lengths_B, compute)
    scores = (q_BHP.to(compute).view(B, K, H // K, P) @ keys.transpose(-1, -2)) * scale
    visible = _visible(k_BKSP, lengths_B)[:, None, None]
    maps = torch.softmax(scores.masked_fill(~visible, torch.finfo(compute).min), dim=-1)
    return maps.masked_fill(~visible, 0)


def _seen(cache_BKSP: Tensor, lengths_B: Tensor, dtype: torch.dtype) -> Tensor:
    """The cache with zeros where nothing was stored yet: what lies there may not be finite."""
    hidden = ~_visible(cache_BKSP, lengths_B)[:, None, :, None]
    return cache_BKSP.to(dtype).masked_fill(hidden, 0)


def _visible(cache_BKSP: Tensor, lengths_B: Tensor) -> Tensor:
    columns = torch.arange(cache_BKSP.shape[2], device=cache_BKSP.device)
    return columns < lengths_B[:, None]


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
