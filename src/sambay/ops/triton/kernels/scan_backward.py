"""The gradients of the selective scan: states are recomputed from the saved one of every chunk.

Letters: B rows, T positions, E channels, N states. A program owns L * R channels, channel
l * R + r, in tiles (R, L, N). In memory R comes first, so that R channels lie within a thread; with
L = 8 the rest of a warp holds 4 groups of states. Sums over channels for dB and dC, of which there
are two for every state and position, then take three exchanges per R channels, not five for each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sambay.ops.triton.kernels.arithmetic import LOG2_E, both, softplus_and_slope


@triton.jit
def _pick(tile, places, index):
    """tile[:, :, index] as (R, L, 1)."""
    return tl.expand_dims(tl.sum(tl.where(places == index, tile, 0.0), axis=2), 2)


@triton.jit
def _advance(state, steps, updates, B, rates, resets, places, t, last, n, i, STATES, HAS_RESETS):
    """(the state one position on, B_t as (1, 1, N)) for position t = tile's first + i."""
    inside = t < last
    B_N = tl.load(B + t * STATES + n, mask=both(n < STATES, inside), other=0.0)[None, None, :]
    decay = tl.exp2(rates * _pick(steps, places, i))
    if HAS_RESETS:
        decay = tl.where(tl.load(resets + t, mask=inside, other=0) != 0, 0.0, decay)
    return decay * state + _pick(updates, places, i) * B_N


@triton.jit
def scan_backward(
    dy,
    dlast,
    x,
    delta,
    A,
    B,
    C,
    D,
    bias,
    start,
    resets,
    saved,
    scratch,
    dx,
    ddelta,
    dA,
    dB,
    dC,
    dD,
    dbias,
    dfirst,
    length,
    channels,
    chunks,
    segment,
    dy_row,
    dy_step,
    x_row,
    x_step,
    delta_row,
    delta_step,
    STATES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_LAST: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_RESETS: tl.constexpr,
):
    """All gradients; those that are sums over rows, segments or channels as one part per program.

    Grid (blocks of channels, rows, segments). A is (N, E) here, `start` (B, N, E); `dlast` and
    `dfirst` are (B, segments, N, E): dL/ds behind each segment and before it. dA is
    (B, segments, N, E), dD and dbias (B, segments, E); dB and dC (blocks, B, T, N). `scratch` holds
    a chunk's states before every STEPS positions.
    """
    b, index = tl.program_id(1).to(tl.int64), tl.program_id(2)
    block, segments = tl.program_id(0), tl.num_programs(2)
    part = b * segments + index
    r, lane = tl.arange(0, R)[:, None, None], tl.arange(0, L)[None, :, None]
    # Of equally strided axes the compiler would give any to the threads; it takes L first if told
    # that its values follow each other. Only the first axis is ever loaded in wide words.
    e = tl.max_contiguous(block * (R * L) + lane * R + r, (R, 2, 1))  # (R, L, 1)
    n, places = tl.arange(0, BLOCK_N), tl.arange(0, STEPS)[None, None, :]
    n3 = n[None, None, :]
    real_e, real = e < channels, (e < channels) & (n3 < STATES)
    first = index * segment
    last = tl.minimum(first + segment, length)

    rates = tl.load(A + n3 * channels + e, mask=real, other=0.0) * LOG2_E
    z_bias = tl.load(bias + e, mask=real_e, other=0.0)
    skip = tl.load(D + e, mask=real_e, other=0.0)
    g = tl.zeros((R, L, BLOCK_N), tl.float32)  # dL/ds behind the position at hand
    if HAS_LAST:
        g += tl.load(dlast + (part * STATES + n3) * channels + e, mask=real, other=0.0)
    sum_dA = tl.zeros((R, L, BLOCK_N), tl.float32)
    sum_dD, sum_dbias = tl.zeros((R, L), tl.float32), tl.zeros((R, L), tl.float32)

    x += b * x_row + e
    delta += b * delta_row + e
    dy += b * dy_row + e
    dx += b * length * channels + e
    ddelta += b * length * channels + e
    B += b * length * STATES
    C += b * length * STATES
    sums = (block.to(tl.int64) * tl.num_programs(1) + b) * length * STATES
    resets += b * length
    # In memory as in the tile: R consecutive values for a thread.
    size: tl.constexpr = R * L * BLOCK_N
    scratch += (part * tl.num_programs(0) + block) * (CHUNK // STEPS) * size
    scratch += n3 * (L * R) + tl.max_contiguous(lane * R + r, (R, 2, 1))

    first_chunk = first // CHUNK
    count = tl.cdiv(last, CHUNK) - first_chunk
    for back in range(count):
        chunk = first_chunk + count - 1 - back
        state = tl.zeros((R, L, BLOCK_N), tl.float32)
        if chunk > 0:
            place = ((b * chunks + chunk - 1) * STATES + n3) * channels + e
            state = tl.load(saved + place, mask=real, other=0.0)
        elif HAS_START:
            state = tl.load(start + (b * STATES + n3) * channels + e, mask=real, other=0.0)
        begin = chunk * CHUNK
        groups = tl.cdiv(tl.minimum(begin + CHUNK, last) - begin, STEPS)
        for group in range(groups):
            tl.store(scratch + group * size, state)
            t = begin + group * STEPS
            t3 = (t + places).to(tl.int64)
            seen = (t3 < last) & real_e
            z = tl.load(delta + t3 * delta_step, mask=seen, other=0.0).to(tl.float32)
            inputs = tl.load(x + t3 * x_step, mask=seen, other=0.0).to(tl.float32)
            steps, _ = softplus_and_slope(z + z_bias)
            steps = tl.where(seen, steps, 0.0)
            for i in tl.static_range(STEPS):
                state = _advance(
                    state, steps, steps * inputs, B, rates, resets, places, t + i, last, n, i,
                    STATES, HAS_RESETS,
                )  # fmt: skip
        tl.debug_barrier()
        for group_back in range(groups):
            group = groups - 1 - group_back
            t = begin + group * STEPS
            t3 = (t + places).to(tl.int64)
            seen = (t3 < last) & real_e
            z = tl.load(delta + t3 * delta_step, mask=seen, other=0.0).to(tl.float32)
            inputs = tl.load(x + t3 * x_step, mask=seen, other=0.0).to(tl.float32)
            outputs = tl.load(dy + t3 * dy_step, mask=seen, other=0.0).to(tl.float32)
            steps, slopes = softplus_and_slope(z + z_bias)
            steps = tl.where(seen, steps, 0.0)  # behind the end the state stays as it is
            updates = steps * inputs
            state = tl.load(scratch + group * size)
            states = (state,)
            for i in tl.static_range(STEPS):
                state = _advance(
                    state, steps, updates, B, rates, resets, places, t + i, last, n, i,
                    STATES, HAS_RESETS,
                )  # fmt: skip
                states = states + (state,)  # noqa: RUF005 - kernels know no unpacking
            by_update = tl.zeros((R, L, STEPS), tl.float32)
            by_rate = tl.zeros((R, L, STEPS), tl.float32)
            for i in tl.static_range(STEPS - 1, -1, -1):
                inside = t + i < last
                at = (t + i) * STATES + n
                real_n = both(n < STATES, inside)
                B_N = tl.load(B + at, mask=real_n, other=0.0)[None, None, :]
                C_N = tl.load(C + at, mask=real_n, other=0.0)[None, None, :]
                out, step = _pick(outputs, places, i), _pick(steps, places, i)
                g += out * C_N
                sum_dC = tl.sum(tl.sum(out * states[i + 1], axis=0), axis=0)
                sum_dB = tl.sum(tl.sum(g * _pick(updates, places, i), axis=0), axis=0)
                tl.store(dC + sums + at, sum_dC, mask=real_n)
                tl.store(dB + sums + at, sum_dB, mask=real_n)
                du = tl.expand_dims(tl.sum(g * B_N, axis=2), 2)
                by_update = tl.where(places == i, du, by_update)
                decay = tl.exp2(rates * step)
                if HAS_RESETS:
                    reset = tl.load(resets + t + i, mask=inside, other=0)
                    decay = tl.where(reset != 0, 0.0, decay)
                g *= decay
                # From here on dL/d(dt A), the gradient of the decay's exponent.
                exponent = g * states[i]
                sum_dA += exponent * step
                total = tl.expand_dims(tl.sum(exponent * rates, axis=2), 2)
                by_rate = tl.where(places == i, total, by_rate)
            dz = (by_rate * (1.0 / LOG2_E) + by_update * inputs) * slopes
            tl.store(ddelta + t3 * channels, dz, mask=seen)
            tl.store(dx + t3 * channels, by_update * steps + outputs * skip, mask=seen)
            sum_dbias += tl.sum(tl.where(seen, dz, 0.0), axis=2)
            sum_dD += tl.sum(outputs * inputs, axis=2)
        tl.debug_barrier()
    tl.store(dA + (part * STATES + n3) * channels + e, sum_dA, mask=real)
    tl.store(dD + part * channels + e, tl.expand_dims(sum_dD, 2), mask=real_e)
    tl.store(dbias + part * channels + e, tl.expand_dims(sum_dbias, 2), mask=real_e)
    tl.store(dfirst + (part * STATES + n3) * channels + e, g, mask=real)
