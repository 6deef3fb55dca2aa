"""The scan of Mamba-2, whose decay is one number per head, and one step of it.

    s_t = exp(dt_t * A) * s_{t-1} + dt_t * x_t B_t^T        dt_t = softplus(delta_t + delta_bias)
    y_t = s_t C_t + D * x_t

(arXiv 2405.21060, section 6: state space duality.) Because a whole head decays alike, the scan is
also a product with a masked matrix, and is computed by matrix products. All heads share B and C.
Shape letters: B rows, T positions, H heads, P channels per head, N states per channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sambay.ops import registry
from sambay.ops.state_space_dual import chunked, mamba_ssm, reference
from sambay.ops.state_space_dual.step import state_space_dual_step

__all__ = ["state_space_dual", "state_space_dual_step"]

registry.register("state_space_dual", "reference", 0, reference.scan)
registry.register("state_space_dual", "torch", 10, chunked.scan)
registry.register("state_space_dual", "mamba_ssm", 20, mamba_ssm.scan, mamba_ssm.why_unavailable)


def state_space_dual(
    x_BTHP: Tensor,
    delta_BTH: Tensor,
    A_H: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_H: Tensor,
    *,
    delta_bias_H: Tensor,
    initial_state_BHPN: Tensor | None = None,
    resets_BT: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, final state): y (B, T, H, P) in x's dtype, the state (B, H, P, N) after the last token.

    x, delta, B and C share one floating dtype; A, D, delta_bias and the states are float32 (float64
    if x is), and so is all computation. `resets_BT` (bool) marks tokens that start a document: the
    state is zeroed before them, also the initial one. Where delta is -1e4 or less the state passes
    unchanged. Differentiable in every floating input and in both outputs; only the reference
    has second derivatives.

    Raises:
        BackendUnavailable: the named one ("reference", "torch", "mamba_ssm") cannot serve the call.
    """
    rows, length, heads, channels = x_BTHP.shape
    assert length > 0, "the scan needs at least one token"
    assert delta_BTH.shape == (rows, length, heads), (delta_BTH.shape, x_BTHP.shape)
    assert A_H.shape == D_H.shape == delta_bias_H.shape == (heads,), (A_H.shape, D_H.shape)
    assert B_BTN.shape == C_BTN.shape == (rows, length, B_BTN.shape[-1]), (B_BTN.shape, C_BTN.shape)
    assert x_BTHP.dtype == delta_BTH.dtype == B_BTN.dtype == C_BTN.dtype
    compute = torch.float64 if x_BTHP.dtype == torch.float64 else torch.float32
    assert A_H.dtype == D_H.dtype == delta_bias_H.dtype == compute, (A_H.dtype, D_H.dtype)
    if initial_state_BHPN is not None:
        state = (rows, heads, channels, B_BTN.shape[-1])
        assert initial_state_BHPN.shape == state, (initial_state_BHPN.shape, state)
        assert initial_state_BHPN.dtype == compute, initial_state_BHPN.dtype
    if resets_BT is not None:
        assert resets_BT.shape == (rows, length), resets_BT.shape
        assert resets_BT.dtype == torch.bool, resets_BT.dtype
    scan = registry.choose("state_space_dual", backend, x_BTHP)
    return scan(
        x_BTHP, delta_BTH, A_H, B_BTN, C_BTN, D_H, delta_bias_H, initial_state_BHPN, resets_BT
    )
