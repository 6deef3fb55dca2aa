"""The causal convolution as its definition: one token after another, one weight after another."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def convolve(
    x_BTE: Tensor,
    weight_EW: Tensor,
    bias_E: Tensor,
    initial_state_BCE: Tensor | None,
    resets_BT: Tensor | None,
) -> Tensor:
    """y of `causal_conv`; autograd differentiates it as often as asked."""
    compute = torch.float64 if x_BTE.dtype == torch.float64 else torch.float32
    weight, bias = weight_EW.to(compute), bias_E.to(compute)
    rows, length, channels = x_BTE.shape
    width = weight.shape[1]
    if initial_state_BCE is None:
        earlier = x_BTE.new_zeros(rows, width - 1, channels, dtype=compute)
    else:
        earlier = initial_state_BCE.to(compute)
    outputs = []
    for t in range(length):
        if resets_BT is not None:
            earlier = earlier.masked_fill(resets_BT[:, t, None, None], 0.0)
        window_BWE = torch.cat([earlier, x_BTE[:, t, None].to(compute)], 1)
        total = bias.expand(rows, channels)
        for w in range(width):
            total = total + weight[:, w] * window_BWE[:, w]
        outputs.append(silu(total))
        earlier = window_BWE[:, 1:]
    return torch.stack(outputs, 1).to(x_BTE.dtype)
