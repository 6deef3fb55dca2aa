"""Differential attention over many queries: both softmaxes in one pass over keys and values.

Letters: B rows, T queries, S columns, P head dimension. A program owns a block of queries of one
differential head and keeps both maps' sums over both halves of the value.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sambay.ops.triton.kernels.arithmetic import LOG2_E


@triton.jit
def _softmax_step(scores, visible, maximum, weight):
    """(probabilities, the factor for what was summed before, new maximum, new weight)"""
    scores = tl.where(visible, scores * LOG2_E, -float("inf"))
    new = tl.maximum(maximum, tl.max(scores, axis=1))
    safe = tl.where(new == -float("inf"), 0.0, new)  # a query that has seen nothing yet
    shrink = tl.exp2(maximum - safe)
    probabilities = tl.exp2(scores - safe[:, None])
    return probabilities, shrink, new, weight * shrink + tl.sum(probabilities, axis=1)


@triton.jit
def differential_forward(
    q,
    k,
    v,
    lambda_weight,
    starts,
    segments,
    out,
    queries,
    capacity,
    window,
    group,
    scale,
    q_row,
    q_head,
    q_column,
    k_row,
    k_head,
    k_column,
    v_row,
    v_head,
    v_column,
    HEAD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """first - lambda * second, (B, H / 2, T, 2 P). Grid (blocks of queries, H / 2, B).

    The queries are the last T of S columns; `window` counts visible columns, S for all of them.
    """
    block, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    t, p = block * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_P)
    real_t, real_p = t < queries, p < HEAD
    first_query = capacity - queries + block * BLOCK_T
    i = capacity - queries + t
    q += b * q_row + tl.cast(2 * head, tl.int64) * q_head
    place_q = tl.cast(t, tl.int64)[:, None] * q_column + p[None, :]
    real_q = real_t[:, None] & real_p[None, :]
    queries1 = tl.load(q + place_q, mask=real_q, other=0.0)
    queries2 = tl.load(q + q_head + place_q, mask=real_q, other=0.0)
    pair = tl.cast(2 * (head // group), tl.int64)
    k += b * k_row + pair * k_head
    v += b * v_row + pair * v_head

    low = tl.maximum(first_query - window + 1, 0)
    start = 0
    if HAS_STARTS:
        start = tl.load(starts + b).to(tl.int32)
        low = tl.minimum(tl.maximum(low, start), first_query)  # a query always sees itself
    high = tl.minimum(first_query + BLOCK_T, capacity)
    mine = t * 0
    if HAS_SEGMENTS:
        mine = tl.load(segments + b * capacity + i, mask=real_t, other=-1).to(tl.int32)
    maximum1 = tl.full((BLOCK_T,), -float("inf"), tl.float32)
    maximum2 = tl.full((BLOCK_T,), -float("inf"), tl.float32)
    weight1, weight2 = tl.zeros((BLOCK_T,), tl.float32), tl.zeros((BLOCK_T,), tl.float32)
    total11 = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)  # map 1, first half of the value
    total12 = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    total21 = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    total22 = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    for begin in range(low // BLOCK_S * BLOCK_S, high, BLOCK_S):
        j = begin + tl.arange(0, BLOCK_S)
        stored = j < capacity
        column = tl.cast(j, tl.int64)
        place_k = column[None, :] * k_column + p[:, None]
        place_v = column[:, None] * v_column + p[None, :]
        real_k = real_p[:, None] & stored[None, :]
        real_v = stored[:, None] & real_p[None, :]
        keys1 = tl.load(k + place_k, mask=real_k, other=0.0)
        keys2 = tl.load(k + k_head + place_k, mask=real_k, other=0.0)
        values1 = tl.load(v + place_v, mask=real_v, other=0.0)
        values2 = tl.load(v + v_head + place_v, mask=real_v, other=0.0)
        visible = (j[None, :] <= i[:, None]) & (j[None, :] > i[:, None] - window)
        if HAS_STARTS:
            visible = visible & (j >= start)[None, :]
        if HAS_SEGMENTS:
            theirs = tl.load(segments + b * capacity + j, mask=stored, other=-2).to(tl.int32)
            visible = visible & (mine[:, None] == theirs[None, :])
        visible = visible | (j[None, :] == i[:, None])
        scores = tl.dot(queries1, keys1, input_precision=PRECISION) * scale
        maps, shrink, maximum1, weight1 = _softmax_step(scores, visible, maximum1, weight1)
        maps = maps.to(queries1.dtype)
        total11 = total11 * shrink[:, None] + tl.dot(maps, values1, input_precision=PRECISION)
        total12 = total12 * shrink[:, None] + tl.dot(maps, values2, input_precision=PRECISION)
        scores = tl.dot(queries2, keys2, input_precision=PRECISION) * scale
        maps, shrink, maximum2, weight2 = _softmax_step(scores, visible, maximum2, weight2)
        maps = maps.to(queries1.dtype)
        total21 = total21 * shrink[:, None] + tl.dot(maps, values1, input_precision=PRECISION)
        total22 = total22 * shrink[:, None] + tl.dot(maps, values2, input_precision=PRECISION)
    inverse1 = (1.0 / weight1)[:, None]
    inverse2 = (tl.load(lambda_weight).to(tl.float32) / weight2)[:, None]
    row = (b * heads + head) * queries + tl.cast(t, tl.int64)
    place = out + row[:, None] * (2 * HEAD) + p[None, :]
    dtype = out.dtype.element_ty
    tl.store(place, (total11 * inverse1 - total21 * inverse2).to(dtype), mask=real_q)
    tl.store(place + HEAD, (total12 * inverse1 - total22 * inverse2).to(dtype), mask=real_q)
