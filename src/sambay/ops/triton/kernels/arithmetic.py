"""Pieces that several kernels share: functions of the field in float32, and rows of a tile."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softplus_and_slope(z):
    """(log(1 + e^z), its derivative), both to float32's relative precision for any z.

    A time step of 1e-4 is the logarithm of 1.0001, of which the GPU's logarithm keeps three digits.
    The series of 2 artanh(e / (2 + e)) keeps all: its argument is at most 1/3.
    """
    e = tl.exp2(-tl.abs(z) * LOG2_E)
    s = e / (2.0 + e)
    q = s * s
    series = 1.0 / 13.0 + q * (1.0 / 15.0)
    series = 1.0 / 11.0 + q * series
    series = 1.0 / 9.0 + q * series
    series = 1.0 / 7.0 + q * series
    series = 1.0 / 5.0 + q * series
    series = 1.0 / 3.0 + q * series
    series = 1.0 + q * series
    return tl.maximum(z, 0.0) + 2.0 * s * series, tl.where(z >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x); e^-x may be infinite."""
    return 1.0 / (1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def row(tile, index: tl.constexpr):
    """tile[index] of a float32 tile whose first axis lies within a thread: then this costs nothing.

    The sum is over integers, of which the compiler drops the zeros.
    """
    bits = tile.to(tl.int32, bitcast=True)
    rows = tl.arange(0, tile.shape[0])
    for _ in tl.static_range(len(tile.shape) - 1):
        rows = rows[:, None] if len(rows.shape) == 1 else rows[:, None, :]
    return tl.sum(tl.where(rows == index, bits, 0), axis=0).to(tl.float32, bitcast=True)


@triton.jit
def both(real, inside):
    """real & inside for a tensor and a scalar, which the interpreter would take for integers."""
    return tl.where(inside, real, False)


@triton.jit
def load_rows(pointers, step, first, last, real, ROWS: tl.constexpr):
    """The rows first, first + 1, ... of a strided tensor, zero from `last` on, (ROWS, channels).

    Row by row: a tile loaded at once would be laid out for wide loads, its rows across threads.
    """
    r = tl.arange(0, ROWS)[:, None]
    tile = tl.zeros((ROWS, real.shape[0]), pointers.dtype.element_ty)
    for i in tl.static_range(ROWS):
        place = pointers + tl.cast(first + i, tl.int64) * step
        values = tl.load(place, mask=both(real, first + i < last), other=0.0)
        tile = tl.where(r == i, values[None, :], tile)
    return tile
