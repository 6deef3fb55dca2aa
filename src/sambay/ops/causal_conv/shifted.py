"""The causal convolution in plain torch: the sequence, shifted once per weight, summed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, silu


def convolve(
    x_BTE: Tensor,
    weight_EW: Tensor,
    bias_E: Tensor,
    initial_state_BCE: Tensor | None,
    resets_BT: Tensor | None,
) -> Tensor:
    """y of `causal_conv`, on any device."""
    compute = torch.float64 if x_BTE.dtype == torch.float64 else torch.float32
    weight, bias = weight_EW.to(compute), bias_E.to(compute)
    length, width = x_BTE.shape[1], weight.shape[1]
    if initial_state_BCE is None:
        padded = pad(x_BTE.to(compute), (0, 0, width - 1, 0))
    else:
        padded = torch.cat([initial_state_BCE.to(compute), x_BTE.to(compute)], 1)
    total = torch.addcmul(bias, weight[:, width - 1], padded[:, width - 1 :])
    hidden_BT = None  # True where a document starts between the shifted token and this one
    for lag in range(1, width):
        earlier = padded[:, width - 1 - lag : width - 1 - lag + length]
        if resets_BT is not None:
            crossed = pad(resets_BT, (lag - 1, 0))[:, :length]
            hidden_BT = crossed if hidden_BT is None else hidden_BT | crossed
            earlier = earlier.masked_fill(hidden_BT[:, :, None], 0.0)
        total = torch.addcmul(total, weight[:, width - 1 - lag], earlier)
    return silu(total).to(x_BTE.dtype)
