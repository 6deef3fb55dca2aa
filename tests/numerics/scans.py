"""Inputs for the selective scan, and its backends as functions of nine positional inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from sambay.ops.selective_scan import selective_scan


def make_inputs(
    rows: int,
    length: int,
    channels: int,
    states: int,
    dtype: torch.dtype = torch.float32,
    *,
    initial: bool = True,
    resets: bool = False,
) -> list[Tensor | None]:
    """Inputs as a mixer makes them: B and C are slices of one projection."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    projected = torch.randn(rows, length, 3 + 2 * states, dtype=dtype)
    return [
        torch.randn(rows, length, channels, dtype=dtype),
        torch.randn(rows, length, channels, dtype=dtype) - 2,
        -torch.rand(channels, states, dtype=compute) * 8 - 0.05,
        projected[..., 3 : 3 + states],
        projected[..., 3 + states :],
        torch.randn(channels, dtype=compute),
        torch.randn(channels, dtype=compute) * 0.3,
        torch.randn(rows, channels, states, dtype=compute) if initial else None,
        torch.rand(rows, length) < 0.1 if resets else None,
    ]


def scan_with(backend: str | None):
    def run(x, delta, A, B, C, D, delta_bias, initial_state, resets):
        return selective_scan(
            x,
            delta,
            A,
            B,
            C,
            D,
            delta_bias_E=delta_bias,
            initial_state_BEN=initial_state,
            resets_BT=resets,
            backend=backend,
        )

    return run


def in_float64(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [
        tensor.double() if tensor is not None and tensor.is_floating_point() else tensor
        for tensor in inputs
    ]
