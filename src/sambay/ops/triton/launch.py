"""Starting a Triton kernel on the device of its tensors, and whether there can be one."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from sambay.ops.tracing import constant_when_traced

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CAPABILITY = (8, 0)  # the oldest GPUs with bfloat16, for which the tests compile every kernel


def why_unavailable(tensor: Tensor | None) -> str | None:
    """None if the kernels can serve a call with this tensor, else the reason and the remedy."""
    wanted = "cpu" if interpreted() else "cuda"
    # First what costs nothing: this is asked at every call, and most are not for a GPU.
    if tensor is not None and tensor.device.type != wanted:
        return f"it computes on {wanted} tensors, this one is on {tensor.device.type}"
    reason = _why_not_here()
    if tensor is None or reason is not None:
        return reason
    if tensor.dtype not in DTYPES:
        return f"it takes bfloat16, float16 and float32, not {str(tensor.dtype).split('.')[-1]}"
    if wanted == "cuda" and _capability(tensor.device.index or 0) < CAPABILITY:
        return "it needs a GPU of compute capability 8.0 or newer"
    return None


def why_unavailable_untraced(tensor: Tensor | None) -> str | None:
    """The same for kernels that are no torch operators, which torch.compile cannot trace."""
    if torch.compiler.is_compiling():
        return "torch.compile does not trace its kernels"
    return why_unavailable(tensor)


# Traced code can neither import nor read the environment; the answers hold for the whole process.
@constant_when_traced
def _why_not_here() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; run: pip install triton"
    if not interpreted() and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


@constant_when_traced
def interpreted() -> bool:
    """Whether triton is told to run kernels on the CPU, in Python."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@constant_when_traced
@functools.cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def processors(device: torch.device) -> int:
    """The multiprocessors of a device, to size a grid by; a few on the CPU."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def kernel(module: str, name: str) -> Any:
    """A kernel of `kernels/`, compiled at its first launch."""
    return getattr(importlib.import_module(f"sambay.ops.triton.kernels.{module}"), name)


def launch(
    module: str, name: str, grid: tuple[int, ...], first: Tensor, *others: Any, **options: Any
) -> None:
    """Run a kernel of `kernels/module.py` on the device of its first argument; reads nothing back.

    `options` are the kernel's constants, num_warps and num_stages.
    """
    options.setdefault("enable_fp_fusion", True)  # triton 3.10 turns it off by itself
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        kernel(module, name)[grid](first, *others, **options)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`: tiles have no other sizes."""
    return 1 << max(size - 1, 0).bit_length()
