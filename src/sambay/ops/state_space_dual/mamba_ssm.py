"""The Mamba-2 scan by the Triton kernels of the package mamba_ssm, on CUDA devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sambay.ops.optional_kernel import load_kernel
from sambay.ops.tracing import constant_when_traced, never_traced

CHUNK = 256  # tokens per chunk, as the published models were trained with


def why_unavailable(x: Tensor | None) -> str | None:
    """None if the kernels can serve a call with this x, else the reason and the remedy."""
    if x is not None:
        if x.device.type != "cuda":
            return f"it computes on CUDA devices, the tensors are on {x.device.type}"
        if x.dtype == torch.float64:
            return "it takes bfloat16, float16 and float32, not float64"
        # Its products of float32 values keep 10 bits; who has not allowed that expects 23.
        if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32":
            return (
                "its float32 products are rounded to TF32; "
                "torch.set_float32_matmul_precision('high') allows that, or compute in bfloat16"
            )
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    kernel = _kernel()
    return kernel if isinstance(kernel, str) else None


# Traced code cannot import; the answer is one for the whole process.
@constant_when_traced
def _kernel() -> Callable[..., Any] | str:
    """mamba_chunk_scan_combined, or the reason why there is none."""
    return _load()


@functools.cache
def _load() -> Callable[..., Any] | str:
    return load_kernel(
        "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", "mamba-ssm"
    )


@never_traced  # the kernels are not made to be
def scan(
    x_BTHP: Tensor,
    delta_BTH: Tensor,
    A_H: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_H: Tensor,
    delta_bias_H: Tensor,
    initial_state_BHPN: Tensor | None,
    resets_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y, final state) of `state_space_dual`, differentiable once.

    The states between chunks are rounded to x's dtype where they enter a product; the final state
    is not.
    """
    kernel = _kernel()
    assert not isinstance(kernel, str), kernel
    documents = None
    if resets_BT is not None:
        # The kernel lets a token see the initial state where the document's number is zero.
        documents = resets_BT.cumsum(1, dtype=torch.int32)
    return kernel(
        x_BTHP,
        delta_BTH,
        A_H,
        B_BTN[:, :, None],  # one group of heads
        C_BTN[:, :, None],
        CHUNK,
        D=D_H,
        dt_bias=delta_bias_H,
        initial_states=initial_state_BHPN,
        seq_idx=documents,
        dt_softplus=True,
        return_final_states=True,
    )
