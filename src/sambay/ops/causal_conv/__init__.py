"""Causal depth-wise convolution with SiLU over a sequence, and one step of it.

    y_t = silu(bias + sum over w of weight[:, w] * x_{t - W + 1 + w})

(arXiv 2312.00752, section 3.4; the last weight multiplies the current token.)
Shape letters: B rows, T positions, E channels, W width, C = W - 1 earlier inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sambay.ops import registry
from sambay.ops.causal_conv import native, reference, shifted
from sambay.ops.causal_conv.step import causal_conv_step
from sambay.ops.native import library

__all__ = ["causal_conv", "causal_conv_step"]

registry.register("causal_conv", "reference", 0, reference.convolve)
registry.register("causal_conv", "torch", 10, shifted.convolve)
registry.register("causal_conv", "native", 20, native.convolve, library.serves)


def causal_conv(
    x_BTE: Tensor,
    weight_EW: Tensor,
    bias_E: Tensor,
    *,
    initial_state_BCE: Tensor | None = None,
    resets_BT: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y (B, T, E) in x's dtype, computed in float32 (float64 if x is float64).

    `initial_state_BCE` holds the inputs before the first token, oldest first; without it they are
    zero. `resets_BT` (bool) marks tokens that start a document: they and those after them see zeros
    in place of what came before, also of the initial state. Differentiable in x, weight, bias and
    the initial state.

    Raises:
        BackendUnavailable: the named one ("reference", "torch", "native") cannot serve the call.
    """
    rows, length, channels = x_BTE.shape
    assert length > 0, "the convolution needs at least one token"
    assert weight_EW.shape[0] == channels, (weight_EW.shape, x_BTE.shape)
    if initial_state_BCE is not None:
        earlier = (rows, weight_EW.shape[1] - 1, channels)
        assert initial_state_BCE.shape == earlier, (initial_state_BCE.shape, earlier)
    if resets_BT is not None:
        assert resets_BT.shape == (rows, length), resets_BT.shape
        assert resets_BT.dtype == torch.bool, resets_BT.dtype
    convolve = registry.choose("causal_conv", backend, x_BTE)
    return convolve(x_BTE, weight_EW, bias_E, initial_state_BCE, resets_BT)
