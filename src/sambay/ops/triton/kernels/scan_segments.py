"""What a long sequence needs to be scanned in segments side by side: the carry into each.

The recurrence forwards is s_t = a_t s_{t-1} + (dt x)_t B_t; the one of the gradient backwards is
g_{t-1} = a_t (g_t + dy_t C_t). Both are: fold a segment that begins with zero, then chain the folds
by the decay of whole segments, exp(A * the sum of dt), which a reset makes zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sambay.ops.triton.kernels.arithmetic import LOG2_E, both, load_rows, row, softplus_and_slope


@triton.jit
def scan_fold(
    values,
    delta,
    A,
    B,
    bias,
    resets,
    folds,
    sums,
    length,
    channels,
    segments,
    segment,
    values_row,
    values_step,
    delta_row,
    delta_step,
    STATES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STEPS: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_RESETS: tl.constexpr,
):
    """Every segment's carry out from a zero carry in, and its sum of dt (infinite with a reset).

    Forwards `values` is x and `B` is B; in reverse they are dy and C, and folding starts at the
    segment's end. Grid (blocks of channels, rows, segments); folds (B, segments, N, E).
    """
    b, index = tl.program_id(1).to(tl.int64), tl.program_id(2)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    t = tl.arange(0, STEPS)
    real_e, real_n = e < channels, n < STATES
    first = index * segment
    last = tl.minimum(first + segment, length)
    rates = load_rows(A + e * STATES, 1, first * 0, STATES, real_e, BLOCK_N) * LOG2_E
    z_bias = tl.load(bias + e, mask=real_e, other=0.0)[None, :]
    carry = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    total = tl.zeros((BLOCK_E,), tl.float32)
    values += b * values_row + e
    delta += b * delta_row + e
    B += b * length * STATES
    resets += b * length
    tiles = tl.cdiv(last - first, STEPS)
    for count in range(tiles):
        tile = first + (tiles - 1 - count if REVERSE else count) * STEPS
        inputs = load_rows(values, values_step, tile, last, real_e, STEPS).to(tl.float32)
        z = load_rows(delta, delta_step, tile, last, real_e, STEPS).to(tl.float32) + z_bias
        steps, _ = softplus_and_slope(z)
        steps = tl.where((tile + t < last)[:, None], steps, 0.0)
        total += tl.sum(steps, axis=0)
        updates = inputs if REVERSE else steps * inputs
        for j in tl.static_range(STEPS):
            at = tile + (STEPS - 1 - j if REVERSE else j)
            inside = at < last
            B_N = tl.load(B + at * STATES + n, mask=both(real_n, inside), other=0.0)
            update = B_N[:, None] * row(updates, STEPS - 1 - j if REVERSE else j)[None, :]
            decay = tl.exp2(rates * row(steps, STEPS - 1 - j if REVERSE else j)[None, :])
            if HAS_RESETS:
                reset = tl.load(resets + at, mask=inside, other=0)
                decay = tl.where(reset != 0, 0.0, decay)
                total = tl.where(reset != 0, float("inf"), total)
            if REVERSE:
                carry = decay * (carry + update)
            else:
                carry = decay * carry + update
    place = (b * segments + index) * STATES + n[:, None]
    tl.store(folds + place * channels + e[None, :], carry, mask=real_n[:, None] & real_e[None, :])
    tl.store(sums + (b * segments + index) * channels + e, total, mask=real_e)


@triton.jit
def scan_chain(
    folds,
    sums,
    A,
    begin,
    carries,
    channels,
    segments,
    STATES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_BEGIN: tl.constexpr,
):
    """The carry into every segment, (B, segments, N, E), from `begin` (B, E, N) or zero.

    Grid (blocks of channels, rows).
    """
    b = tl.program_id(1).to(tl.int64)
    e = (tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E))[None, :]
    n = tl.arange(0, BLOCK_N)[:, None]
    real = (n < STATES) & (e < channels)
    rates = tl.load(A + e * STATES + n, mask=real, other=0.0) * LOG2_E
    carry = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    if HAS_BEGIN:
        carry += tl.load(begin + (b * channels + e) * STATES + n, mask=real, other=0.0)
    for count in range(segments):
        index = b * segments + (segments - 1 - count if REVERSE else count)
        place = (index * STATES + n) * channels + e
        tl.store(carries + place, carry, mask=real)
        total = tl.load(sums + index * channels + e, mask=e < channels, other=0.0)
        # A rate of zero times an infinite sum would not be a decay of zero.
        decay = tl.where(total == float("inf"), 0.0, tl.exp2(rates * total))
        carry = decay * carry + tl.load(folds + place, mask=real, other=0.0)
