"""Inputs for the scan of Mamba-2, and its backends as functions of nine positional inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from sambay.ops.state_space_dual import state_space_dual


def make_inputs(
    rows: int,
    length: int,
    heads: int,
    channels: int,
    states: int,
    dtype: torch.dtype = torch.float32,
    *,
    initial: bool = True,
    resets: bool = False,
) -> list[Tensor | None]:
    """Inputs as a mixer makes them: x, B and C are slices of one convolution."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    inner = heads * channels
    convolved = torch.randn(rows, length, inner + 2 * states, dtype=dtype)
    return [
        convolved[..., :inner].unflatten(-1, (heads, channels)),
        torch.randn(rows, length, heads, dtype=dtype) - 2,
        -torch.rand(heads, dtype=compute) * 8 - 0.05,
        convolved[..., inner : inner + states],
        convolved[..., inner + states :],
        torch.randn(heads, dtype=compute),
        torch.randn(heads, dtype=compute) * 0.3,
        torch.randn(rows, heads, channels, states, dtype=compute) if initial else None,
        torch.rand(rows, length) < 0.1 if resets else None,
    ]


def scan_with(backend: str | None):
    def run(x, delta, A, B, C, D, delta_bias, initial_state, resets):
        return state_space_dual(
            x,
            delta,
            A,
            B,
            C,
            D,
            delta_bias_H=delta_bias,
            initial_state_BHPN=initial_state,
            resets_BT=resets,
            backend=backend,
        )

    return run
