"""Differential attention: the difference of two softmax maps over paired heads.

arXiv 2410.05258, in the form used by arXiv 2507.06607 (appendix): query heads (2j, 2j+1) form
differential head j and read key heads (2p, 2p+1), p = j // (H / K); its value is the concatenation
of both value heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sambay.ops import differential_prefill as prefill
from sambay.ops.attention import AttentionCall, attention, serves_one_query, visible_columns
from sambay.ops.decode import native
from sambay.ops.registry import reference_forced


def lambda_init(layer_index: int) -> float:
    """0.8 - 0.6 exp(-0.3 l), where l is the 0-based index of the layer in the whole stack."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer_index)


def differential_attention(
    q_BHTP: Tensor,
    k_BKSP: Tensor,
    v_BKSP: Tensor,
    weight: Tensor,
    *,
    scale: float,
    window: int | None = None,
    starts_B: Tensor | None = None,
    segments_BT: Tensor | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """The difference O1 - weight * O2 per differential head, (B, H / 2, T, 2 P).

    `weight` is the scalar lambda in the dtype of the values. H and K must be even. Visibility and
    dropout are those of `attention`; each map drops probabilities of its own, before the
    subtraction.
    """
    B, H, T, P = q_BHTP.shape
    K, S = k_BKSP.shape[1:3]
    group = H // K
    call = AttentionCall(q_BHTP, k_BKSP, v_BKSP, scale, window, starts_B, segments_BT, dropout)
    if T == 1 and backend is None and not reference_forced() and not serves_one_query(call):
        lengths, starts = visible_columns(call)
        q, weights = q_BHTP[:, :, 0], (weight, None)  # the norm is the layer's
        out = native.attend_differential(
            q, k_BKSP, v_BKSP, lengths, *weights, scale, 0.0, 1.0, starts
        )
        return out.view(B, H // 2, 1, 2 * P)
    fused = T > 1 and backend is None and not dropout and not reference_forced()
    if fused and prefill.serves(q_BHTP, k_BKSP, v_BKSP, weight):
        return prefill.differential_prefill(
            q_BHTP,
            k_BKSP,
            v_BKSP,
            weight,
            scale=scale,
            window=window,
            starts_B=starts_B,
            segments_BT=segments_BT,
        )
    # (pair, member of group, map) -> (pair, map, member): then plain grouped heads apply.
    q = q_BHTP.view(B, K // 2, group, 2, T, P).transpose(2, 3).reshape(B, H, T, P)
    if T == 1 and backend is None and not dropout:
        return _one_query(q, k_BKSP, v_BKSP, weight, scale, window, starts_B)
    values = v_BKSP.view(B, K // 2, 2, S, P).unbind(2)
    if dropout:  # one call, as both halves of the value have to meet the same map
        values = (torch.cat(values, dim=-1),)
    parts = []
    for part in values:
        value = part[:, :, None].expand(-1, -1, 2, -1, -1).reshape(B, K, S, part.shape[-1])
        out = attention(
            q,
            k_BKSP,
            value,
            scale=scale,
            window=window,
            starts_B=starts_B,
            segments_BT=segments_BT,
            dropout=dropout,
            backend=backend,
        )
        parts.append(out.view(B, K // 2, 2, group, T, part.shape[-1]))
    first, second = torch.cat(parts, dim=-1).unbind(2)
    return (first - weight * second).reshape(B, H // 2, T, 2 * P)


def _one_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    scale: float,
    window: int | None,
    starts: Tensor | None,
) -> Tensor:
    """A decode step: the maps are subtracted before they meet the values, so each is read once."""
    B, H, _, P = q.shape
    K, S = k.shape[1:3]
    first = 0 if window is None else max(S - window, 0)
    k, v = k[:, :, first:], v[:, :, first:]
    scores = q.reshape(B, K, H // K, P) @ k.transpose(-1, -2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    if starts is not None:
        columns = torch.arange(first, S, device=q.device)
        visible = (columns >= starts[:, None]) | (columns == S - 1)
        scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    maps = torch.softmax(scores, dim=-1).view(B, K // 2, 2, H // K, S - first)
    difference = (maps[:, :, 0] - weight * maps[:, :, 1]).to(v.dtype)
    out = difference[:, :, None] @ v.view(B, K // 2, 2, S - first, P)
    return out.permute(0, 1, 3, 2, 4).reshape(B, H // 2, 1, 2 * P)
