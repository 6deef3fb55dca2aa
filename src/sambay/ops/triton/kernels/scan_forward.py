"""The selective scan forward: each program advances all states of a block of channels in registers.

Letters: B rows, T positions, E channels, N states. Tiles are (positions, channels) or (states,
channels); with at least as many channels as threads the first axis lies within a thread, so that
the sum over states is local and nothing but loads and stores leaves the registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sambay.ops.triton.kernels.arithmetic import LOG2_E, both, load_rows, row, softplus_and_slope


@triton.jit
def scan_forward(
    x,
    delta,
    A,
    B,
    C,
    D,
    bias,
    starts,
    resets,
    y,
    final,
    saved,
    length,
    channels,
    chunks,
    segment,
    x_row,
    x_step,
    delta_row,
    delta_step,
    start_row,
    start_segment,
    start_channel,
    start_state,
    STATES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    SAVE: tl.constexpr,
):
    """y, the final state and the states before every chunk but the first.

    Grid (blocks of channels, rows, segments); a segment of `segment` positions, a multiple of
    CHUNK, starts from its own state in `starts`. B and C are (B, T, N) in float32.
    """
    b, index = tl.program_id(1).to(tl.int64), tl.program_id(2)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    t = tl.arange(0, STEPS)
    real_e, real_n = e < channels, n < STATES
    real = real_n[:, None] & real_e[None, :]
    first = index * segment
    last = tl.minimum(first + segment, length)

    origin = first * 0
    rates = load_rows(A + e * STATES, 1, origin, STATES, real_e, BLOCK_N) * LOG2_E
    z_bias = tl.load(bias + e, mask=real_e, other=0.0)[None, :]
    skip = tl.load(D + e, mask=real_e, other=0.0)[None, :]
    state = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    if HAS_START:
        start = starts + b * start_row + index * start_segment + e * start_channel
        state += load_rows(start, start_state, origin, STATES, real_e, BLOCK_N)

    x += b * x_row + e
    delta += b * delta_row + e
    y += b * length * channels + e[None, :]
    B += b * length * STATES
    C += b * length * STATES
    # The next tile is on its way while this one is computed.
    next_x = load_rows(x, x_step, first, last, real_e, STEPS)
    next_z = load_rows(delta, delta_step, first, last, real_e, STEPS)
    for tile in range(first, last, STEPS):
        here = tile + t
        valid = (here < last)[:, None] & real_e[None, :]
        inputs, z = next_x.to(tl.float32), next_z.to(tl.float32) + z_bias
        next_x = load_rows(x, x_step, tile + STEPS, last, real_e, STEPS)
        next_z = load_rows(delta, delta_step, tile + STEPS, last, real_e, STEPS)
        if SAVE:  # noqa: SIM102 - known when the kernel is compiled, the other is not
            if (tile > 0) & (tile % CHUNK == 0):
                place = (b * chunks + tile // CHUNK - 1) * STATES + n
                tl.store(saved + place[:, None] * channels + e[None, :], state, mask=real)
        steps, _ = softplus_and_slope(z)
        steps = tl.where(valid, steps, 0.0)  # nothing happens to the state behind the end
        updates, outputs = steps * inputs, skip * inputs
        for i in tl.static_range(STEPS):
            inside = tile + i < last
            at = (tile + i) * STATES + n
            B_N = tl.load(B + at, mask=both(real_n, inside), other=0.0)
            C_N = tl.load(C + at, mask=both(real_n, inside), other=0.0)
            decay = tl.exp2(rates * row(steps, i)[None, :])
            if HAS_RESETS:
                reset = tl.load(resets + b * length + tile + i, mask=inside, other=0)
                decay = tl.where(reset != 0, 0.0, decay)
            state = decay * state + B_N[:, None] * row(updates, i)[None, :]
            total = tl.sum(state * C_N[:, None], axis=0)
            outputs += tl.where(t[:, None] == i, total[None, :], 0.0)
        tl.store(y + tl.cast(here, tl.int64)[:, None] * channels, outputs, mask=valid)
    if last == length:
        place = (b * channels + e[None, :]) * STATES + n[:, None]
        tl.store(final + place, state, mask=real)
