"""The causal convolution in C++ (ops/native/causal_conv.cpp), on the CPU, as a torch operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sambay.ops.native.library import address, kernels, rows_of, sequence
from sambay.ops.second_derivative import refuse_second_derivative

_INPUTS = "Tensor x, Tensor weight, Tensor bias, Tensor? initial_state, Tensor? resets"
_library = torch.library.Library("sambay", "FRAGMENT")
_library.define(f"causal_conv_native({_INPUTS}) -> Tensor")
_library.define(
    f"causal_conv_native_backward(Tensor dy, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)"
)


class _Call:
    """The arguments that forward and backward share; it also keeps the converted tensors alive."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        initial_state: Tensor | None,
        resets: Tensor | None,
    ) -> None:
        x = rows_of(x)
        weight_WE = weight.t().contiguous()
        bias = bias.contiguous()
        if initial_state is not None:
            initial_state = initial_state.contiguous()
        if resets is not None:
            resets = resets.contiguous()
        self.tensors = (x, weight_WE, bias, initial_state, resets)
        self.arguments = (
            *sequence(x),
            weight_WE.data_ptr(),
            bias.data_ptr(),
            address(initial_state),
            address(resets),
            *x.shape,
            weight.shape[1],
            x.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    initial_state: Tensor | None,
    resets: Tensor | None,
) -> Tensor:
    call = _Call(x, weight, bias, initial_state, resets)
    y = x.new_empty(x.shape)
    kernels().sambay_conv_forward(*call.arguments, y.data_ptr())
    return y


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    initial_state: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = _Call(x, weight, bias, initial_state, resets)
    dy = rows_of(dy)
    dx, _, _, dinitial = _gradients(x, weight, bias, initial_state)
    channels, width = weight.shape
    parameters = weight.new_empty(width + 1, channels)
    workspace = weight.new_empty(kernels().sambay_conv_workspace(*x.shape, width))
    kernels().sambay_conv_backward(
        *call.arguments,
        *sequence(dy),
        dx.data_ptr(),
        parameters.data_ptr(),
        None if initial_state is None else dinitial.data_ptr(),
        workspace.data_ptr(),
    )
    return dx, parameters[:width].t().contiguous(), parameters[width].clone(), dinitial


def _gradients(
    x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised gradients of x, weight, bias and the initial state (empty without one)."""
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        bias.new_empty(bias.shape),
        weight.new_empty(0 if initial_state is None else initial_state.shape),
    )


_library.impl("causal_conv_native", _forward, "CPU")
_library.impl("causal_conv_native_backward", _backward, "CPU")


@torch.library.register_fake("sambay::causal_conv_native", lib=_library)
def _(x, weight, bias, initial_state, resets):
    return x.new_empty(x.shape)


@torch.library.register_fake("sambay::causal_conv_native_backward", lib=_library)
def _(dy, x, weight, bias, initial_state, resets):
    return _gradients(x, weight, bias, initial_state)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> Any:
    inputs = ctx.saved_tensors
    *gradients, dinitial = torch.ops.sambay.causal_conv_native_backward.default(dy, *inputs)
    return *gradients, None if inputs[3] is None else dinitial, None


torch.library.register_autograd(
    "sambay::causal_conv_native", _differentiate, setup_context=_keep, lib=_library
)
_refuse = refuse_second_derivative("causal_conv's native backend", "torch")
torch.library.register_autograd("sambay::causal_conv_native_backward", _refuse, lib=_library)
_operator = torch.ops.sambay.causal_conv_native.default


def convolve(
    x_BTE: Tensor,
    weight_EW: Tensor,
    bias_E: Tensor,
    initial_state_BCE: Tensor | None,
    resets_BT: Tensor | None,
) -> Tensor:
    """y of `causal_conv`; parameters and state in other precisions are converted here."""
    if initial_state_BCE is not None:
        initial_state_BCE = initial_state_BCE.float()
    return _operator(x_BTE, weight_EW.float(), bias_E.float(), initial_state_BCE, resets_BT)
