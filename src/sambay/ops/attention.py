"""Causal attention for every case the family needs, behind one signature.

Shape letters: B batch, T queries, S keys, H query heads, K key heads, P head dimension.

The queries are the last T of the S columns. A key at column j is visible to the query at column i
if j <= i, j > i - window, j >= starts[b] (columns before are padding) and both columns belong to
the same segment. A query always sees itself, so that padding rows stay finite; no other row reads
them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sambay.errors import ConfigError
from sambay.ops import registry
from sambay.ops.decode import native

# Queries per SDPA call where a mask is needed: bounds the mask to this many rows.
QUERY_BLOCK = 256


class AttentionCall(NamedTuple):
    """The arguments of one call, as the backends see them."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    window: int | None
    starts: Tensor | None
    segments: Tensor | None
    dropout: float = 0.0


def attention(
    q_BHTP: Tensor,
    k_BKSP: Tensor,
    v_BKSP: Tensor,
    *,
    scale: float,
    window: int | None = None,
    starts_B: Tensor | None = None,
    segments_BT: Tensor | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """The attended values, (B, H, T, P) in the dtype of the queries.

    Query head h reads key head h // (H / K). `window` counts the visible columns including the
    query's own. `starts_B` (int64) is the first real column of each row. `segments_BT` numbers the
    documents of a packed row and needs S == T. `dropout` is the share of the probabilities that
    become 0 (the others are divided by 1 - dropout), drawn from torch's global generator; which
    ones depends on the backend and, for the same state of the generator, on nothing but the shapes.
    Values may be wider or narrower than keys.

    Raises:
        ConfigError: segments together with cached columns.
        BackendUnavailable: the named backend cannot serve this call.
    """
    T, S = q_BHTP.shape[2], k_BKSP.shape[2]
    if segments_BT is not None and T != S:
        raise ConfigError("segments: packed rows cannot continue a cache; start from an empty one")
    if window is not None and window >= S:
        window = None
    call = AttentionCall(q_BHTP, k_BKSP, v_BKSP, scale, window, starts_B, segments_BT, dropout)
    return registry.choose("attention", backend, call)(call)


def reference_attention(call: AttentionCall, keep_BHTS: Tensor | None = None) -> Tensor:
    """The definition: one dense map per head, in float32 or better.

    keep_BHTS: bool, which probabilities dropout keeps; drawn if it is not given.
    """
    q, k, v = call.q, call.k, call.v
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    k, v = (x.to(dtype).repeat_interleave(group, dim=1) for x in (k, v))
    S = k.shape[2]
    queries = torch.arange(S - q.shape[2], S, device=q.device)
    visible = _visible(call, queries, torch.arange(S, device=q.device))
    scores = (q.to(dtype) @ k.transpose(-1, -2)) * call.scale
    scores = scores.masked_fill(~visible, float("-inf"))
    probabilities = torch.softmax(scores, dim=-1)
    if call.dropout:
        if keep_BHTS is None:
            keep_BHTS = torch.rand_like(probabilities) >= call.dropout
        probabilities = probabilities * keep_BHTS / (1 - call.dropout)
    return (probabilities @ v).to(q.dtype)


def _sdpa(call: AttentionCall) -> Tensor:
    """torch's fused attention, called so that no mask grows with T x S."""
    T, S = call.q.shape[2], call.k.shape[2]
    if T == 0:
        return call.q.new_empty(*call.q.shape[:3], call.v.shape[3])
    if T == 1:
        return _one_query(call)
    if call.window is not None:
        return _banded(call, call.window)
    # On the CPU torch has no fused kernel with dropout: blocks at least skip what nobody sees.
    dense = call.dropout > 0 and call.q.device.type == "cpu"
    if call.starts is None and call.segments is None and T == S and not dense:
        return _dot_product(call, call.q, call.k, call.v, None)
    return _query_blocks(call)


def _dot_product(
    call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> Tensor:
    """torch's fused attention on tensors cut from those of the call; causal without a mask."""
    if v.shape[-1] != q.shape[-1] and q.device.type == "cuda":
        # The one fused kernel for values of another width does not group heads.
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=call.dropout,
        is_causal=mask is None,
        scale=call.scale,
        enable_gqa=True,
    )


def _one_query(call: AttentionCall) -> Tensor:
    """A decode step: the query heads of a group become rows, so each key is read once."""
    B, H, _, P = call.q.shape
    K, S = call.k.shape[1:3]
    first = 0 if call.window is None else S - call.window
    mask = None
    if call.starts is not None:
        columns = torch.arange(first, S, device=call.q.device)
        mask = ((columns >= call.starts[:, None]) | (columns == S - 1))[:, None, None]
    out = F.scaled_dot_product_attention(
        call.q.reshape(B, K, H // K, P),
        call.k[:, :, first:],
        call.v[:, :, first:],
        attn_mask=mask,
        dropout_p=call.dropout,
        scale=call.scale,
    )
    return out.reshape(B, H, 1, -1)


def _query_blocks(call: AttentionCall) -> Tensor:
    """A loop over blocks of queries, each against the columns it can see, with a boolean mask."""
    T, S = call.q.shape[2], call.k.shape[2]
    parts = []
    for first in range(0, T, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, T)
        low, high = _first_visible(call, first), S - T + last
        queries = torch.arange(S - T + first, high, device=call.q.device)
        keys = torch.arange(low, high, device=call.q.device)
        parts.append(
            _dot_product(
                call,
                call.q[:, :, first:last],
                call.k[:, :, low:high],
                call.v[:, :, low:high],
                _visible(call, queries, keys),
            )
        )
    return torch.cat(parts, dim=2)


def _first_visible(call: AttentionCall, first: int) -> int:
    """The first column any query from row `first` on can see; skips finished documents."""
    if call.segments is None or call.q.device.type != "cpu" or torch.compiler.is_compiling():
        return 0
    same = call.segments == call.segments[:, first : first + 1]
    return int(same.int().argmax(dim=1).min())


def _banded(call: AttentionCall, window: int) -> Tensor:
    """Windowed attention: blocks of queries and the band of keys before them, folded into B.

    Work and memory grow with T x (window + block), not with T x S.
    """
    q, k, v = call.q, call.k, call.v
    B, H, T, P = q.shape
    S = k.shape[2]
    block = _band_block(window, T)
    before = -(-(window - 1) // block) * block  # whole blocks of keys before a block of queries
    num_blocks = -(-T // block)
    band = before + block

    # Columns from `first` to `first + before + num_blocks * block`; outside 0..S they are masked.
    first = S - T - before
    tail = num_blocks * block - T
    k, v = (F.pad(x[:, :, max(first, 0) :], (0, 0, max(-first, 0), tail)) for x in (k, v))
    q = F.pad(q, (0, 0, 0, tail)).view(B, H, num_blocks, block, P).transpose(1, 2)
    k, v = (x.unfold(2, band, block).permute(0, 2, 1, 4, 3).flatten(0, 1) for x in (k, v))

    starts = torch.arange(num_blocks, device=q.device)[:, None] * block
    queries = S - T + starts + torch.arange(block, device=q.device)
    keys = first + starts + torch.arange(band, device=q.device)
    visible = _visible(call, queries, keys)  # (B or 1, num_blocks, block, band)
    mask = visible.expand(B, -1, -1, -1).flatten(0, 1).unsqueeze(1)
    out = _dot_product(call, q.flatten(0, 1), k, v, mask)
    out = out.view(B, num_blocks, H, block, -1).transpose(1, 2)
    return out.reshape(B, H, num_blocks * block, -1)[:, :, :T]


def _band_block(window: int, T: int) -> int:
    """Queries per block: about half a window, where masked-out work and copies balance."""
    block = 1 << max(5, (max(window - 1, 1)).bit_length() - 1)
    return min(block, 1 << max(5, (T - 1).bit_length()))


def _visible(call: AttentionCall, queries: Tensor, keys: Tensor) -> Tensor:
    """Which key columns (..., keys) each query column (..., queries) sees, (B or 1, ..., Q, K)."""
    S = call.k.shape[2]
    i, j = queries[..., :, None], keys[..., None, :]
    visible = (j <= i) & (j >= 0)
    if call.window is not None:
        visible = visible & (j > i - call.window)
    visible = visible[None]
    if call.starts is not None:
        visible = visible & (j >= call.starts.view(-1, *[1] * j.dim()))
    if call.segments is not None:
        segments = call.segments
        mine = segments[:, queries.clamp(0, S - 1)][..., :, None]
        theirs = segments[:, keys.clamp(0, S - 1)][..., None, :]
        visible = visible & (mine == theirs)
    visible = visible | (i == j)
    return visible if queries.dim() > 1 else visible[:, None]


def _native(call: AttentionCall) -> Tensor:
    """One query per row in C++."""
    lengths, starts = visible_columns(call)
    q, k, v = call.q[:, :, 0], call.k, call.v
    return native.attend(q, k, v, lengths, call.scale, starts)[:, :, None]


def visible_columns(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """How many columns the last query of each row sees, and where they begin, (B,) int64 each."""
    S = call.k.shape[2]
    first = 0 if call.window is None else max(S - call.window, 0)
    if call.starts is None and first == 0:
        return call.k.new_full((len(call.k),), S, dtype=torch.int64), None
    starts = call.k.new_full((len(call.k),), first, dtype=torch.int64)
    if call.starts is not None:
        starts = torch.maximum(starts, call.starts).clamp(max=S - 1)
    return S - starts, starts


def serves_one_query(call: AttentionCall | None) -> str | None:
    """None if the C++ kernels for a decode step can serve the call, else the reason."""
    if call is None:
        return native.serves_decoding(None)
    if call.q.shape[2] != 1 or torch.is_grad_enabled() or call.dropout:
        return "it serves single queries without gradients"
    if call.v.shape[3] != call.q.shape[3] or call.segments is not None:
        return "its values are as wide as its keys, and it knows no segments"
    return native.serves_decoding(call.q)


registry.register("attention", "reference", 0, reference_attention)
registry.register("attention", "sdpa", 10, _sdpa)
registry.register("attention", "native", 20, _native, serves_one_query)
