"""One token of the Mamba-2 scan, for decoding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


@torch.no_grad()
def state_space_dual_step(
    x_BHP: Tensor,
    delta_BH: Tensor,
    A_H: Tensor,
    B_BN: Tensor,
    C_BN: Tensor,
    D_H: Tensor,
    *,
    delta_bias_H: Tensor,
    state_BHPN: Tensor,
) -> Tensor:
    """y (B, H, P) of one more token, in x's dtype; `state_BHPN` (float32) is updated in place.

    The same equations, dtypes and padding rule as `state_space_dual`; not differentiable.
    """
    compute = state_BHPN.dtype
    x, B, C = x_BHP.to(compute), B_BN.to(compute), C_BN.to(compute)
    dt_BH = softplus(delta_BH.to(compute) + delta_bias_H)
    state_BHPN.mul_((dt_BH * A_H).exp_()[..., None, None])
    state_BHPN.addcmul_((dt_BH[..., None] * x)[..., None], B[:, None, None])
    # Not a matrix product: autocast would round it, and the state is read only once either way.
    y_BHP = (state_BHPN * C[:, None, None]).sum(-1).addcmul_(x, D_H[:, None])
    return y_BHP.to(x_BHP.dtype)
