"""The gated delta rule as its definition: one token after another, in float32 (or float64)."""

from __future__ import annotations

import torch
from torch import Tensor


def scan(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor,
    beta_BTH: Tensor,
    initial_state_BHKV: Tensor | None,
    resets_BT: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(o, final state) of `gated_delta`; autograd differentiates it as often as asked."""
    compute = torch.float64 if v_BTHV.dtype == torch.float64 else torch.float32
    q, k, v = q_BTHK.to(compute), k_BTHK.to(compute), v_BTHV.to(compute)
    decay, beta = torch.exp(log_decay_BTH.to(compute)), beta_BTH.to(compute)
    rows, length, heads, keys = k.shape
    if initial_state_BHKV is None:
        state = k.new_zeros(rows, heads, keys, v.shape[-1])
    else:
        state = initial_state_BHKV.to(compute)
    outputs = []
    for t in range(length):
        if resets_BT is not None:
            state = state.masked_fill(resets_BT[:, t, None, None, None], 0.0)
        state = decay[:, t, :, None, None] * state
        read_BHV = (state * k[:, t, :, :, None]).sum(-2)
        change_BHV = beta[:, t, :, None] * (v[:, t] - read_BHV)
        state = state + k[:, t, :, :, None] * change_BHV[:, :, None]
        outputs.append(scale * (state * q[:, t, :, :, None]).sum(-2))
    return torch.stack(outputs, 1).to(v_BTHV.dtype), state
