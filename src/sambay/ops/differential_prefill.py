"""Differential attention over many queries by a Triton kernel, on CUDA devices; forward only.

As two calls per map on half-width values keys are read twice and scores computed twice; here each
tile of keys and values meets both softmaxes once. The floor is the operations: 12 P per visible
pair of columns and differential head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sambay.ops.triton.launch import interpreted, launch, power_of_two, why_unavailable_untraced

QUERIES = 64  # of a program
COLUMNS = 64  # of a tile
WIDEST = 128  # the head dimension up to which the sums fit into registers


def serves(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> bool:
    """Whether the kernel can take this call: on a GPU, of one dtype, and with nothing to learn."""
    tensors = (q, k, v, weight)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    if not q.dtype == k.dtype == v.dtype or q.shape[-1] > WIDEST or not q.is_cuda:
        return False
    return why_unavailable_untraced(q) is None


@torch.no_grad()
def differential_prefill(
    q_BHTP: Tensor,
    k_BKSP: Tensor,
    v_BKSP: Tensor,
    weight: Tensor,
    *,
    scale: float,
    window: int | None = None,
    starts_B: Tensor | None = None,
    segments_BT: Tensor | None = None,
) -> Tensor:
    """O1 - weight * O2, (B, H / 2, T, 2 P), as `sambay.ops.differential` defines it."""
    if interpreted():  # which knows no products of bfloat16 values
        q_BHTP, k_BKSP, v_BKSP = q_BHTP.float(), k_BKSP.float(), v_BKSP.float()
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q_BHTP, k_BKSP, v_BKSP))
    B, H, T, P = q.shape
    K, S = k.shape[1:3]
    out = q.new_empty(B, H // 2, T, 2 * P)
    launch(
        "differential",
        "differential_forward",
        (-(-T // QUERIES), H // 2, B),
        q,
        k,
        v,
        weight,
        q if starts_B is None else starts_B,
        q if segments_BT is None else segments_BT.contiguous(),
        out,
        T,
        S,
        S if window is None else min(window, S),
        H // K,
        scale,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        HEAD=P,
        BLOCK_P=max(power_of_two(P), 16),
        BLOCK_T=QUERIES,
        BLOCK_S=COLUMNS,
        HAS_STARTS=starts_B is not None,
        HAS_SEGMENTS=segments_BT is not None,
        PRECISION="ieee",
        num_warps=4 if P <= 64 else 8,
        num_stages=2,
    )
    return out
