"""One token of the gated delta rule, for decoding."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def gated_delta_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    log_decay_BH: Tensor,
    beta_BH: Tensor,
    *,
    scale: float,
    state_BHKV: Tensor,
) -> Tensor:
    """o (B, H, V) of one more token, in v's dtype; `state_BHKV` (float32) is updated in place.

    The same equations, dtypes and padding rule as `gated_delta`; not differentiable.
    """
    compute = state_BHKV.dtype
    q, k, v = q_BHK.to(compute), k_BHK.to(compute), v_BHV.to(compute)
    decay_BH1 = torch.exp(log_decay_BH.to(compute))[..., None]
    # Reading for the key and the query at once, before the change, saves a pass over the state.
    reads_BH2V = torch.matmul(torch.stack((k, q), 2), state_BHKV)
    read_BHV, o_BHV = (reads_BH2V * decay_BH1[..., None]).unbind(2)
    change_BHV = beta_BH.to(compute)[..., None] * (v - read_BHV)
    state_BHKV.mul_(decay_BH1[..., None]).addcmul_(k[..., None], change_BHV[:, :, None])
    o_BHV = torch.addcmul(o_BHV, (q * k).sum(-1, keepdim=True), change_BHV)
    return o_BHV.mul_(scale).to(v_BHV.dtype)
