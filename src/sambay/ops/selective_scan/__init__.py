"""The Mamba-1 selective scan over a sequence, and one step of it.

    s_t = exp(dt_t * A) * s_{t-1} + dt_t * B_t * x_t        dt_t = softplus(delta_t + delta_bias)
    y_t = C_t . s_t + D * x_t

(arXiv 2312.00752, section 3.2; A is diagonal, B is discretised by Euler's rule as in its code.)
Shape letters: B rows, T positions, E inner channels, N states per channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sambay.ops import registry
from sambay.ops.native import library
from sambay.ops.selective_scan import chunked, mamba_ssm, native, reference, triton
from sambay.ops.selective_scan.step import selective_scan_step

__all__ = ["selective_scan", "selective_scan_step"]

registry.register("selective_scan", "reference", 0, reference.scan)
registry.register("selective_scan", "torch", 10, chunked.scan)
registry.register("selective_scan", "native", 20, native.scan, library.serves)
registry.register("selective_scan", "triton", 20, triton.scan, triton.why_unavailable)
# Never chosen by itself: it serves only some calls, and Triton's kernels serve all.
registry.register("selective_scan", "mamba_ssm", -1, mamba_ssm.scan, mamba_ssm.why_unavailable)


def selective_scan(
    x_BTE: Tensor,
    delta_BTE: Tensor,
    A_EN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_E: Tensor,
    *,
    delta_bias_E: Tensor,
    initial_state_BEN: Tensor | None = None,
    resets_BT: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, final state): y (B, T, E) in x's dtype, the state (B, E, N) after the last token.

    x, delta, B and C share one floating dtype; A, D, delta_bias and the states are float32 (float64
    if x is), and so is all computation. `resets_BT` (bool) marks tokens that start a document: the
    state is zeroed before them, also the initial one. Where delta is -1e4 or less the state passes
    unchanged. Differentiable in every floating input and in both outputs; only the reference
    has second derivatives.

    Raises:
        BackendUnavailable: the named one ("reference", "torch", "native", "triton", "mamba_ssm")
            cannot serve the call.
    """
    rows, length, _ = x_BTE.shape
    assert length > 0, "the scan needs at least one token"
    assert delta_BTE.shape == x_BTE.shape, (delta_BTE.shape, x_BTE.shape)
    assert B_BTN.shape == C_BTN.shape == (rows, length, A_EN.shape[1]), (B_BTN.shape, C_BTN.shape)
    assert x_BTE.dtype == delta_BTE.dtype == B_BTN.dtype == C_BTN.dtype
    compute = torch.float64 if x_BTE.dtype == torch.float64 else torch.float32
    assert A_EN.dtype == D_E.dtype == delta_bias_E.dtype == compute, (A_EN.dtype, D_E.dtype)
    if initial_state_BEN is not None:
        assert initial_state_BEN.shape == (rows, *A_EN.shape), initial_state_BEN.shape
        assert initial_state_BEN.dtype == compute, initial_state_BEN.dtype
    if resets_BT is not None:
        assert resets_BT.shape == (rows, length), resets_BT.shape
        assert resets_BT.dtype == torch.bool, resets_BT.dtype
    scan = registry.choose("selective_scan", backend, x_BTE)
    return scan(
        x_BTE, delta_BTE, A_EN, B_BTN, C_BTN, D_E, delta_bias_E, initial_state_BEN, resets_BT
    )
