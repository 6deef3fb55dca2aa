"""The gated delta rule by the Triton kernels of flash-linear-attention, on CUDA devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sambay.ops.optional_kernel import load_kernel
from sambay.ops.tracing import constant_when_traced

LARGEST_KEY = 256  # elements of one head's key that the kernels hold at once
_DTYPES = (torch.bfloat16, torch.float16)


def why_unavailable(k_BTHK: Tensor | None) -> str | None:
    """None if the kernels can serve a call with these keys, else the reason and the remedy."""
    if k_BTHK is not None:
        if k_BTHK.device.type != "cuda":
            return f"it computes on CUDA devices, the tensors are on {k_BTHK.device.type}"
        if k_BTHK.dtype not in _DTYPES:
            name = str(k_BTHK.dtype).removeprefix("torch.")
            return f"it takes bfloat16 and float16, not {name}"
        if k_BTHK.shape[-1] > LARGEST_KEY:
            return f"it takes keys of at most {LARGEST_KEY} elements, not {k_BTHK.shape[-1]}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    kernel = _kernel()
    return kernel if isinstance(kernel, str) else None


# Traced code cannot import; the answer is one for the whole process.
@constant_when_traced
def _kernel() -> Callable[..., Any] | str:
    """chunk_gated_delta_rule, or the reason why there is none."""
    return _load()


@functools.cache
def _load() -> Callable[..., Any] | str:
    return load_kernel(
        "fla.ops.gated_delta_rule", "chunk_gated_delta_rule", "flash-linear-attention"
    )


class _Documents(NamedTuple):
    """The documents of all rows, one row after another."""

    borders: Tensor  # (documents + 1,) int64: where each starts among B * T tokens; B * T
    first: Tensor  # (B,) the first document of each row
    last: Tensor  # (B,)


def _documents(resets_BT: Tensor) -> _Documents:
    starts_BT = resets_BT.clone()
    starts_BT[:, 0] = True
    borders = torch.nonzero(starts_BT.flatten()).flatten()
    borders = torch.cat([borders, borders.new_tensor([starts_BT.numel()])])
    after = starts_BT.sum(1).cumsum(0)  # documents up to the end of each row
    return _Documents(borders, after - starts_BT.sum(1), after - 1)


def scan(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor,
    beta_BTH: Tensor,
    initial_state_BHKV: Tensor | None,
    resets_BT: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(o, final state) of `gated_delta`.

    The kernels know documents only as one long row with borders, and give the final state of each.
    """
    kernel = _kernel()
    assert not isinstance(kernel, str), kernel
    inputs = {"q": q_BTHK, "k": k_BTHK, "v": v_BTHV, "g": log_decay_BTH, "beta": beta_BTH}
    if resets_BT is None:
        return kernel(
            **inputs, scale=scale, initial_state=initial_state_BHKV, output_final_state=True
        )
    documents = _documents(resets_BT)
    states = None
    if initial_state_BHKV is not None:
        kept = initial_state_BHKV.masked_fill(resets_BT[:, 0, None, None, None], 0.0)
        states = kept.new_zeros(len(documents.borders) - 1, *kept.shape[1:])
        states = states.index_copy(0, documents.first, kept)
    o, finals = kernel(
        **{name: tensor.flatten(0, 1)[None] for name, tensor in inputs.items()},
        scale=scale,
        initial_state=states,
        output_final_state=True,
        cu_seqlens=documents.borders,
    )
    return o.view(v_BTHV.shape), finals[documents.last]
