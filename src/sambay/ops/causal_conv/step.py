"""One token of the causal convolution, for decoding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from sambay.ops.native import library


@torch.no_grad()
def causal_conv_step(
    x_BE: Tensor, weight_EW: Tensor, bias_E: Tensor, *, state_BCE: Tensor
) -> Tensor:
    """y (B, E) of one more token, in x's dtype; `state_BCE` is updated in place.

    The state holds the W-1 inputs before this token, oldest first, in float32 or x's dtype; x takes
    the last place. Not differentiable.
    """
    if _native_serves(x_BE, state_BCE):
        return _native_step(x_BE, weight_EW, bias_E, state_BCE)
    return step_reference(x_BE, weight_EW, bias_E, state_BCE)


def step_reference(x_BE: Tensor, weight_EW: Tensor, bias_E: Tensor, state_BCE: Tensor) -> Tensor:
    """The step in torch, on any device."""
    compute = torch.float64 if x_BE.dtype == torch.float64 else torch.float32
    window_BWE = torch.cat([state_BCE.to(compute), x_BE[:, None].to(compute)], 1)
    state_BCE.copy_(window_BWE[:, 1:])
    total_BE = (window_BWE * weight_EW.t().to(compute)).sum(1).add_(bias_E)
    return silu(total_BE).to(x_BE.dtype)


def _native_serves(x: Tensor, state: Tensor) -> bool:
    # Traced code cannot see what the kernel does with an address.
    if torch.compiler.is_compiling() or not state.is_contiguous():
        return False
    return state.dtype in (torch.float32, x.dtype) and library.serves(x) is None


def _native_step(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Tensor:
    x = library.rows_of(x)
    weight, bias = weight.float().contiguous(), bias.float().contiguous()
    y = x.new_empty(x.shape)
    library.kernels().sambay_conv_step(
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        bias.data_ptr(),
        state.data_ptr(),
        y.data_ptr(),
        *x.shape,
        weight.shape[1],
        x.dtype == torch.bfloat16,
        state.dtype == torch.bfloat16,
        1,  # a few microseconds of work: over before a second thread has woken up
    )
    return y
