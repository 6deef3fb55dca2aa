"""Products with a gate, forwards and backwards, and the gather of one row per sequence.

Rows are the first axis of the grid: only that one takes more than 65535 programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sambay.ops.triton.kernels.arithmetic import sigmoid


@triton.jit
def gate_forward(a, m, y, width, a_row, m_row, BLOCK: tl.constexpr):
    """silu(a) * m, row by row of a grid (rows, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < width
    gate = tl.load(a + row * a_row + column, mask=real, other=0.0).to(tl.float32)
    value = tl.load(m + row * m_row + column, mask=real, other=0.0).to(tl.float32)
    y += row * width + column
    tl.store(y, (gate * sigmoid(gate) * value).to(y.dtype.element_ty), mask=real)


@triton.jit
def gate_backward(dy, a, m, da, dm, width, dy_row, a_row, m_row, BLOCK: tl.constexpr):
    """The gradients of a and m for that of silu(a) * m; nothing but a and m was kept."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < width
    out = tl.load(dy + row * dy_row + column, mask=real, other=0.0).to(tl.float32)
    gate = tl.load(a + row * a_row + column, mask=real, other=0.0).to(tl.float32)
    value = tl.load(m + row * m_row + column, mask=real, other=0.0).to(tl.float32)
    open_share = sigmoid(gate)
    slope = open_share * (1.0 + gate * (1.0 - open_share))
    da += row * width + column
    dm += row * width + column
    tl.store(da, (out * value * slope).to(da.dtype.element_ty), mask=real)
    tl.store(dm, (out * gate * open_share).to(dm.dtype.element_ty), mask=real)


@triton.jit
def gather_rows(x, places, y, width, x_row, x_step, BLOCK: tl.constexpr):
    """x[b, places[b]] for every b of a grid (rows, blocks of columns)."""
    b = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < width
    place = tl.load(places + b).to(tl.int64)
    values = tl.load(x + b * x_row + place * x_step + column, mask=real)
    tl.store(y + b * width + column, values, mask=real)
