"""Attention of one query per row over a long cache: parts of the columns at once, then a merge.

Letters: B rows, H query heads, K key heads, S columns, P head dimension. A program reads a part of
the columns of one key head, or of both heads of a differential pair, once: the queries of the group
are the rows of a tile (those of the first map, then those of the second), so that keys and values
meet all of them. The floor is the bytes of the visible keys and values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sambay.ops.triton.kernels.arithmetic import LOG2_E


@triton.jit
def attend_part(
    q,
    k,
    v,
    lengths,
    sums,
    maxima,
    weights,
    groups,
    capacity,
    scale,
    q_row,
    q_head,
    k_row,
    k_head,
    k_column,
    v_row,
    v_head,
    v_column,
    GROUP: tl.constexpr,
    MAPS: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weighted sums (B, groups, parts, MAPS * GROUP, MAPS * P), their maxima and weights.

    Grid (parts, groups, B); a group is a key head (MAPS 1) or a pair (MAPS 2). Every row's visible
    columns are divided among all parts, whatever its length.
    """
    part, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    parts = tl.num_programs(0)
    rows, p = tl.arange(0, ROWS), tl.arange(0, BLOCK_P)
    real_p = p < HEAD
    # Row m * GROUP + i is member i of map m, which is query head (group * GROUP + i) * MAPS + m.
    real_row = rows < MAPS * GROUP
    head = (group * GROUP + rows % GROUP) * MAPS + rows // GROUP
    place = b * q_row + head[:, None] * q_head + p[None, :]
    queries = tl.load(q + place, mask=real_row[:, None] & real_p[None, :], other=0.0)

    length = tl.minimum(tl.load(lengths + b).to(tl.int32), capacity)
    share = tl.cdiv(tl.cdiv(length, parts), BLOCK_S) * BLOCK_S
    first = part * share
    last = tl.minimum(first + share, length)
    k += b * k_row + tl.cast(group * MAPS, tl.int64) * k_head
    v += b * v_row + tl.cast(group * MAPS, tl.int64) * v_head
    maximum = tl.full((ROWS,), -float("inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, BLOCK_P), tl.float32)
    total2 = tl.zeros((ROWS, BLOCK_P), tl.float32)  # the second half of a pair's value
    for begin in range(first, last, BLOCK_S):
        s = begin + tl.arange(0, BLOCK_S)
        seen = s < last
        column = tl.cast(s, tl.int64)
        real_k = real_p[:, None] & seen[None, :]
        real_v = seen[:, None] & real_p[None, :]
        keys = tl.load(k + column[None, :] * k_column + p[:, None], mask=real_k, other=0.0)
        values = tl.load(v + column[:, None] * v_column + p[None, :], mask=real_v, other=0.0)
        scores = tl.dot(queries, keys.to(queries.dtype), input_precision=PRECISION)
        if MAPS == 2:
            other_k = k + k_head + column[None, :] * k_column + p[:, None]
            keys2 = tl.load(other_k, mask=real_k, other=0.0)
            other_v = v + v_head + column[:, None] * v_column + p[None, :]
            values2 = tl.load(other_v, mask=real_v, other=0.0)
            scores2 = tl.dot(queries, keys2.to(queries.dtype), input_precision=PRECISION)
            scores = tl.where((rows < GROUP)[:, None], scores, scores2)
        scores = tl.where(seen[None, :], scores * (scale * LOG2_E), -float("inf"))
        new = tl.maximum(maximum, tl.max(scores, axis=1))  # finite: a block has a visible column
        shrink = tl.exp2(maximum - new)
        probabilities = tl.exp2(scores - new[:, None])
        weight = weight * shrink + tl.sum(probabilities, axis=1)
        probabilities = probabilities.to(queries.dtype)
        total = total * shrink[:, None]
        total += tl.dot(probabilities, values.to(queries.dtype), input_precision=PRECISION)
        if MAPS == 2:
            total2 = total2 * shrink[:, None]
            total2 += tl.dot(probabilities, values2.to(queries.dtype), input_precision=PRECISION)
        maximum = new
    row = ((b * groups + group) * parts + part) * (MAPS * GROUP) + rows
    tl.store(maxima + row, maximum, mask=real_row)
    tl.store(weights + row, weight, mask=real_row)
    real = real_row[:, None] & real_p[None, :]
    place = sums + row[:, None] * (MAPS * HEAD) + p[None, :]
    tl.store(place, total, mask=real)
    if MAPS == 2:
        tl.store(place + HEAD, total2, mask=real)


@triton.jit
def _merged(sums, maxima, weights, rows, real, width, e, real_e):
    """The attended value (width) of the parts in `rows`; zeros if none saw a column."""
    maximum = tl.load(maxima + rows, mask=real, other=-float("inf"))
    weight = tl.load(weights + rows, mask=real, other=0.0)
    highest = tl.max(maximum, axis=0)
    shrink = tl.where(weight > 0.0, tl.exp2(maximum - highest), 0.0)
    place = sums + rows[:, None] * width + e[None, :]
    part = tl.load(place, mask=real[:, None] & real_e[None, :], other=0.0)
    whole = tl.sum(weight * shrink, axis=0)
    return tl.sum(part * shrink[:, None], axis=0) / tl.where(whole > 0.0, whole, 1.0)


@triton.jit
def merge_parts(
    sums,
    maxima,
    weights,
    lambda_weight,
    norm_weight,
    out,
    parts,
    eps,
    factor,
    GROUP: tl.constexpr,
    MAPS: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """(B, groups * GROUP, MAPS * HEAD): the parts' values, for pairs their normalised difference.

    Grid (GROUP, groups, B). With MAPS 2: factor * RMSNorm(first - lambda * second) * norm_weight.
    """
    member, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    index = b * tl.num_programs(1) + group
    e, part = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_PARTS)
    real, real_e = part < parts, e < MAPS * HEAD
    rows = (index * parts + part) * (MAPS * GROUP) + member
    value = _merged(sums, maxima, weights, rows, real, MAPS * HEAD, e, real_e)
    if MAPS == 2:
        second = _merged(sums, maxima, weights, rows + GROUP, real, MAPS * HEAD, e, real_e)
        value -= tl.load(lambda_weight).to(tl.float32) * second
        mean = tl.sum(value * value, axis=0) / (MAPS * HEAD)
        scales = tl.load(norm_weight + e, mask=real_e, other=0.0).to(tl.float32)
        value *= scales * (factor / tl.sqrt(mean + eps))
    place = (index * GROUP + member) * (MAPS * HEAD) + e
    tl.store(out + place, value.to(out.dtype.element_ty), mask=real_e)


@triton.jit
def store_columns(
    keys,
    values,
    k,
    v,
    columns,
    heads,
    new_key_row,
    new_key_head,
    new_value_row,
    new_value_head,
    k_row,
    k_head,
    k_column,
    v_row,
    v_head,
    v_column,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the new key and value of row b at columns[b], if that is not negative. Grid (B,)."""
    b = tl.program_id(0).to(tl.int64)
    column = tl.load(columns + b).to(tl.int64)
    if column >= 0:
        flat = tl.arange(0, BLOCK)
        head, p = flat // HEAD, flat % HEAD
        real = head < heads
        new = tl.load(keys + b * new_key_row + head * new_key_head + p, mask=real)
        place = k + b * k_row + head * k_head + column * k_column + p
        tl.store(place, new.to(k.dtype.element_ty), mask=real)
        new = tl.load(values + b * new_value_row + head * new_value_head + p, mask=real)
        place = v + b * v_row + head * v_head + column * v_column + p
        tl.store(place, new.to(v.dtype.element_ty), mask=real)
