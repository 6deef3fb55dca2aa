"""The Mamba-2 scan as its definition: one token after another, in float32 (or float64)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def scan(
    x_BTHP: Tensor,
    delta_BTH: Tensor,
    A_H: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_H: Tensor,
    delta_bias_H: Tensor,
    initial_state_BHPN: Tensor | None,
    resets_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y, final state) of `state_space_dual`; autograd differentiates it as often as asked."""
    compute = torch.float64 if x_BTHP.dtype == torch.float64 else torch.float32
    x, B, C = x_BTHP.to(compute), B_BTN.to(compute), C_BTN.to(compute)
    A, D = A_H.to(compute), D_H.to(compute)
    dt_BTH = softplus(delta_BTH.to(compute) + delta_bias_H.to(compute))
    if initial_state_BHPN is None:
        rows, _, heads, channels = x.shape
        state = x.new_zeros(rows, heads, channels, B.shape[-1])
    else:
        state = initial_state_BHPN.to(compute)
    outputs = []
    for t in range(x.shape[1]):
        if resets_BT is not None:
            state = state.masked_fill(resets_BT[:, t, None, None, None], 0.0)
        decay_BH = torch.exp(dt_BTH[:, t] * A)
        inputs_BHP = dt_BTH[:, t, :, None] * x[:, t]
        state = decay_BH[..., None, None] * state + inputs_BHP[..., None] * B[:, t, None, None, :]
        outputs.append((state * C[:, t, None, None, :]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(outputs, 1).to(x_BTHP.dtype), state
