"""The selective scan in C++ (ops/native/selective_scan_*.cpp), on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from sambay.ops.native.library import address, kernels, rows_of, sequence
from sambay.ops.selective_scan.operator import define, gradients_for, outputs_for

CHUNK = 32  # tokens between saved states; their recomputation stays in the first-level cache


class _Call:
    """The arguments that forward and backward share; it also keeps the converted tensors alive."""

    def __init__(
        self,
        x: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        delta_bias: Tensor,
        initial_state: Tensor | None,
        resets: Tensor | None,
    ) -> None:
        x, delta = rows_of(x), rows_of(delta)
        # Every task reads all of B and C, so they are converted once, here.
        B, C = rows_of(B.float()), rows_of(C.float())
        A, D, delta_bias = A.contiguous(), D.contiguous(), delta_bias.contiguous()
        if initial_state is not None:
            initial_state = initial_state.contiguous()
        if resets is not None:
            resets = resets.contiguous()
        self.tensors = (x, delta, A, B, C, D, delta_bias, initial_state, resets)
        self.arguments = (
            *sequence(x),
            *sequence(delta),
            A.data_ptr(),
            *sequence(B),
            *sequence(C),
            D.data_ptr(),
            delta_bias.data_ptr(),
            address(initial_state),
            address(resets),
            *x.shape,
            A.shape[1],
            CHUNK,
            x.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )


def forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    initial_state: Tensor | None,
    resets: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final state, saved states), see `operator.define`."""
    call = _Call(x, delta, A, B, C, D, delta_bias, initial_state, resets)
    y, final_state, saved = outputs_for(x, A, CHUNK, save)
    kernels().sambay_scan_forward(
        *call.arguments, y.data_ptr(), final_state.data_ptr(), saved.data_ptr() if save else None
    )
    return y, final_state, saved


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    initial_state: Tensor | None,
    resets: Tensor | None,
    saved: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients, see `operator.define`."""
    call = _Call(x, delta, A, B, C, D, delta_bias, initial_state, resets)
    dy = rows_of(dy)
    if dfinal is not None:
        dfinal = dfinal.contiguous()
    gradients = gradients_for(x, A, B, initial_state)
    # The sums for dB and dC are taken in float32 also where the result is bfloat16.
    dB, dC = (gradient.float() for gradient in gradients[3:5])
    workspace = A.new_empty(kernels().sambay_scan_workspace(*x.shape, A.shape[1]))
    dx, ddelta, dA, _, _, dD, ddelta_bias, dinitial = gradients
    kernels().sambay_scan_backward(
        *call.arguments,
        *sequence(dy),
        address(dfinal),
        saved.data_ptr(),
        dx.data_ptr(),
        ddelta.data_ptr(),
        dA.data_ptr(),
        dB.data_ptr(),
        dC.data_ptr(),
        dD.data_ptr(),
        ddelta_bias.data_ptr(),
        None if initial_state is None else dinitial.data_ptr(),
        workspace.data_ptr(),
    )
    return dx, ddelta, dA, dB.to(B.dtype), dC.to(B.dtype), dD, ddelta_bias, dinitial


scan = define("selective_scan_native", forward, backward, CHUNK)
