"""The Mamba-2 scan by the Triton kernels of the package mamba_ssm, on CUDA devices."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK = 256  # tokens per chunk, as the published models were trained with


def why_unavailable(x: Tensor | None) -> str | None:
    """None if the kernels can serve a call with this x, else the reason and the remedy."""
    if x is not None:
        if x.device.type != "cuda":
            return f"it computes on CUDA devices, the tensors are on {x.device.type}"
        if x.dtype == torch.float64:
            return "it takes bfloat16, float16 and float32, not float64"
        # Its products of float32 values keep 10 bits; who has not allowed that expects 23.
        if x.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32:
            return (
                "its float32 products are rounded to TF32; "
                "torch.set_float32_matmul_precision('high') allows that, or compute in bfloat16"
            )
    elif not torch.cuda.is_available():
        return "it needs a CUDA device"
    return _why_not_installed()


# Traced code cannot import; the answer is one for the whole process.
@torch.compiler.assume_constant_result
def _why_not_installed() -> str | None:
    try:
        _kernel()
    except ImportError as error:
        return f"the package mamba_ssm cannot be imported ({error}); pip install mamba-ssm"
    except AttributeError:
        return "mamba_ssm is too old, it has no mamba_chunk_scan_combined; pip install -U mamba-ssm"
    return None


def _kernel() -> Callable[..., Any]:
    return importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined


@torch.compiler.disable  # the kernels are not made to be traced
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
    documents = None
    if resets_BT is not None:
        # The kernel lets a token see the initial state where the document's number is zero.
        documents = resets_BT.cumsum(1, dtype=torch.int32)
    y_BTHP, final_BHPN = _kernel()(
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
    return y_BTHP, final_BHPN
