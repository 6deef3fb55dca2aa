"""The selective scan as its definition: one token after another, in float32 (or float64)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def scan(
    x_BTE: Tensor,
    delta_BTE: Tensor,
    A_EN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_E: Tensor,
    delta_bias_E: Tensor,
    initial_state_BEN: Tensor | None,
    resets_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y, final state) of `selective_scan`; autograd differentiates it as often as asked."""
    compute = torch.float64 if x_BTE.dtype == torch.float64 else torch.float32
    x, B, C = x_BTE.to(compute), B_BTN.to(compute), C_BTN.to(compute)
    A, D = A_EN.to(compute), D_E.to(compute)
    dt_BTE = softplus(delta_BTE.to(compute) + delta_bias_E.to(compute))
    if initial_state_BEN is None:
        state = x.new_zeros(x.shape[0], *A.shape)
    else:
        state = initial_state_BEN.to(compute)
    outputs = []
    for t in range(x.shape[1]):
        if resets_BT is not None:
            state = state.masked_fill(resets_BT[:, t, None, None], 0.0)
        decay_BEN = torch.exp(dt_BTE[:, t, :, None] * A)
        inputs_BEN = (dt_BTE[:, t] * x[:, t])[:, :, None] * B[:, t, None, :]
        state = decay_BEN * state + inputs_BEN
        outputs.append((state * C[:, t, None, :]).sum(-1) + D * x[:, t])
    return torch.stack(outputs, 1).to(x_BTE.dtype), state
