"""The selective scan by the CUDA kernels of the package mamba_ssm, where it is installed with them.

They start from a zero state and know no documents within a row, so they serve calls without either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sambay.errors import BackendUnavailable
from sambay.ops.optional_kernel import load_kernel
from sambay.ops.tracing import constant_when_traced, never_traced


def why_unavailable(x: Tensor | None) -> str | None:
    """None if the kernels can serve a call with this x, else the reason and the remedy."""
    if x is not None:
        if x.device.type != "cuda":
            return f"it computes on CUDA devices, the tensors are on {x.device.type}"
        if x.dtype == torch.float64:
            return "it takes bfloat16, float16 and float32, not float64"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    kernel = _kernel()
    return kernel if isinstance(kernel, str) else None


# Traced code cannot import; the answer is one for the whole process.
@constant_when_traced
def _kernel() -> Callable[..., Any] | str:
    """selective_scan_fn, or the reason why there is none."""
    return _load()


@functools.cache
def _load() -> Callable[..., Any] | str:
    return load_kernel("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn", "mamba-ssm")


@never_traced  # the kernels are not made to be
def scan(
    x_BTE: Tensor,
    delta_BTE: Tensor,
    A_EN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_E: Tensor,
    delta_bias_E: Tensor,
    initial_state_BEN: Tensor | None,
    resets_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y, final state) of `selective_scan`, differentiable in all but the final state.

    Raises:
        BackendUnavailable: there is an initial state or a reset.
    """
    if initial_state_BEN is not None or resets_BT is not None:
        raise BackendUnavailable(
            "selective_scan backend 'mamba_ssm' starts from a zero state and knows no resets; "
            "use backend='triton'"
        )
    kernel = _kernel()
    assert not isinstance(kernel, str), kernel
    y_BET, final_BEN = kernel(
        x_BTE.transpose(1, 2),
        delta_BTE.transpose(1, 2),
        A_EN,
        B_BTN.transpose(1, 2),
        C_BTN.transpose(1, 2),
        D_E,
        delta_bias=delta_bias_E,
        delta_softplus=True,
        return_last_state=True,
    )
    return y_BET.transpose(1, 2), final_BEN
