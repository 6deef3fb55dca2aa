"""One token of a Mamba layer: the convolution's and the scan's step, each with its state in place.

Letters: B rows, E channels, N states, W width. The floor of the scan's step is its float32 state,
read and written once: 8 N bytes per row and channel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sambay.ops.triton.kernels.arithmetic import LOG2_E, sigmoid, softplus_and_slope


@triton.jit
def conv_step(
    x,
    weight,
    bias,
    state,
    y,
    channels,
    x_row,
    state_row,
    state_step,
    WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """silu(convolution) of one more token; the state (B, W - 1, E) moves by one place.

    Grid (blocks of channels, B).
    """
    b = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    real = e < channels
    new = tl.load(x + b * x_row + e, mask=real, other=0.0)
    total = tl.load(bias + e, mask=real, other=0.0).to(tl.float32)
    last = tl.load(weight + e * WIDTH + WIDTH - 1, mask=real, other=0.0).to(tl.float32)
    total += last * new.to(tl.float32)
    place = state + b * state_row + e
    for w in tl.static_range(WIDTH - 1):
        old = tl.load(place + w * state_step, mask=real, other=0.0)
        total += tl.load(weight + e * WIDTH + w, mask=real, other=0.0).to(tl.float32) * old.to(
            tl.float32
        )
        if w > 0:
            tl.store(place + (w - 1) * state_step, old, mask=real)
    if WIDTH > 1:
        kept = new.to(state.dtype.element_ty)
        tl.store(place + (WIDTH - 2) * state_step, kept, mask=real)
    y += b * channels + e
    tl.store(y, (total * sigmoid(total)).to(y.dtype.element_ty), mask=real)


@triton.jit
def scan_step(
    x,
    delta,
    A_log,
    B,
    C,
    D,
    bias,
    gate,
    state,
    y,
    channels,
    x_row,
    delta_row,
    B_row,
    C_row,
    gate_row,
    STATES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HAS_GATE: tl.constexpr,
):
    """C . state + D x, times silu(gate) if there is one; the state (B, E, N) is advanced in place.

    Grid (blocks of channels, B). A is -exp(A_log).
    """
    b = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    real_e, real_n = e < channels, n < STATES
    real = real_e[:, None] & real_n[None, :]
    inputs = tl.load(x + b * x_row + e, mask=real_e, other=0.0).to(tl.float32)
    z = tl.load(delta + b * delta_row + e, mask=real_e, other=0.0).to(tl.float32)
    step, _ = softplus_and_slope(z + tl.load(bias + e, mask=real_e, other=0.0))
    logs = tl.load(A_log + e[:, None] * STATES + n[None, :], mask=real, other=0.0)
    rates = -tl.exp2(logs * LOG2_E) * LOG2_E
    B_N = tl.load(B + b * B_row + n, mask=real_n, other=0.0).to(tl.float32)
    C_N = tl.load(C + b * C_row + n, mask=real_n, other=0.0).to(tl.float32)
    place = state + (b * channels + e[:, None]) * STATES + n[None, :]
    states = tl.load(place, mask=real, other=0.0) * tl.exp2(step[:, None] * rates)
    states += (step * inputs)[:, None] * B_N[None, :]
    tl.store(place, states, mask=real)
    total = tl.sum(states * C_N[None, :], axis=1)
    total += inputs * tl.load(D + e, mask=real_e, other=0.0)
    if HAS_GATE:
        gates = tl.load(gate + b * gate_row + e, mask=real_e, other=0.0).to(tl.float32)
        total *= gates * sigmoid(gates)
    y += b * channels + e
    tl.store(y, total.to(y.dtype.element_ty), mask=real_e)
