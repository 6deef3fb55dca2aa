"""One token of the selective scan, for decoding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from sambay.ops.native import library

# Below this many state elements a step is over before a second thread has woken up.
PARALLEL_ELEMENTS = 1 << 17


@torch.no_grad()
def selective_scan_step(
    x_BE: Tensor,
    delta_BE: Tensor,
    A_EN: Tensor,
    B_BN: Tensor,
    C_BN: Tensor,
    D_E: Tensor,
    *,
    delta_bias_E: Tensor,
    state_BEN: Tensor,
) -> Tensor:
    """y (B, E) of one more token, in x's dtype; `state_BEN` (float32) is updated in place.

    The same equations, dtypes and padding rule as `selective_scan`; not differentiable.
    """
    if _native_serves(x_BE, state_BEN):
        return _native_step(x_BE, delta_BE, A_EN, B_BN, C_BN, D_E, delta_bias_E, state_BEN)
    return step_reference(x_BE, delta_BE, A_EN, B_BN, C_BN, D_E, delta_bias_E, state_BEN)


def step_reference(
    x_BE: Tensor,
    delta_BE: Tensor,
    A_EN: Tensor,
    B_BN: Tensor,
    C_BN: Tensor,
    D_E: Tensor,
    delta_bias_E: Tensor,
    state_BEN: Tensor,
) -> Tensor:
    """The step in torch, on any device."""
    compute = state_BEN.dtype
    x, B, C = x_BE.to(compute), B_BN.to(compute), C_BN.to(compute)
    dt_BE = softplus(delta_BE.to(compute) + delta_bias_E)
    state_BEN.mul_((dt_BE[:, :, None] * A_EN).exp_())
    state_BEN.addcmul_((dt_BE * x)[:, :, None], B[:, None, :])
    y_BE = (state_BEN * C[:, None, :]).sum(-1).addcmul_(x, D_E)
    return y_BE.to(x_BE.dtype)


def _native_serves(x: Tensor, state: Tensor) -> bool:
    # Traced code cannot see what the kernel does with an address.
    if torch.compiler.is_compiling() or not state.is_contiguous() or state.dtype != torch.float32:
        return False
    return library.serves(x) is None


def _native_step(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    state: Tensor,
) -> Tensor:
    x, delta, B, C = map(library.rows_of, (x, delta, B, C))
    A, D, delta_bias = A.contiguous(), D.contiguous(), delta_bias.contiguous()
    y = x.new_empty(x.shape)
    library.kernels().sambay_scan_step(
        x.data_ptr(),
        x.stride(0),
        delta.data_ptr(),
        delta.stride(0),
        A.data_ptr(),
        B.data_ptr(),
        B.stride(0),
        C.data_ptr(),
        C.stride(0),
        D.data_ptr(),
        delta_bias.data_ptr(),
        state.data_ptr(),
        y.data_ptr(),
        *state.shape,
        x.dtype == torch.bfloat16,
        torch.get_num_threads() if state.numel() >= PARALLEL_ELEMENTS else 1,
    )
    return y
