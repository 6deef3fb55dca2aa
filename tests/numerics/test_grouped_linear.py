"""Products with weights of 4 and 8 bits in groups, against their definition in float64.

Tolerances are those of test_decode.py: a few more sums of the same length, and one rounding.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sambay.ops import decode
from sambay.ops.decode.groups import pack_int4, unpack_int4
from tests.numerics.twins import NATIVE, assert_alike

TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 4e-3}
DTYPES = [torch.float32, torch.bfloat16]
# Features, size, group: odd counts of rows and of blocks, a group as wide as a row, one of 160.
SHAPES = [(21, 96, 32), (9, 320, 64), (1, 128, 128), (67, 160, 160), (6, 384, 128)]
ROWS = [1, 2, 3, 4, 5, 32]
EVERY_ROWS = [
    pytest.param(rows, marks=pytest.mark.slow) for rows in range(1, 33) if rows not in ROWS
]


def integers(bits: int, *shape: int) -> Tensor:
    """Random ones, both ends among them."""
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    found = torch.randint(low, high + 1, shape, dtype=torch.int8)
    found[0, 0], found[-1, -1] = low, high
    return found


def exact(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The product in float64, written without groups: one scale for every weight."""
    scales = scale.double().repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    return x.double() @ (weight.double() * scales).t() + bias.double()


def test_packing_keeps_every_integer_at_its_place() -> None:
    weight = integers(4, 7, 96)
    packed = pack_int4(weight)
    assert packed.dtype is torch.uint8
    assert packed.shape == (7, 48)
    assert torch.equal(unpack_int4(packed), weight)
    # As described: the four numbers of a word are the weights l, 8 + l, 16 + l and 24 + l.
    numbers = torch.arange(-8, 8, dtype=torch.int8).repeat(2)[None]
    first, second = pack_int4(numbers)[0, :2].tolist()
    assert (first & 15, first >> 4, second & 15, second >> 4) == (0, 8, 0, 8)
    assert pack_int4(numbers)[0, 2:4].tolist() == [first + 0x11, second + 0x11]


@pytest.mark.parametrize("backend", [NATIVE, "reference"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("rows", [*ROWS, *EVERY_ROWS])
def test_products(backend, bits, dtype, scale_dtype, rows) -> None:
    for features, size, group in SHAPES:
        weight = integers(bits, features, size)
        x = torch.randn(rows, size + 1).to(dtype)[:, 1:]  # rows that are not next to each other
        scale, bias = torch.rand(features, size // group).to(scale_dtype), torch.randn(features)
        bias = bias.to(dtype)
        stored = pack_int4(weight) if bits == 4 else weight
        out = decode.grouped_linear(x, stored, scale, bias, backend=backend)
        assert out.dtype == dtype
        assert_alike([out], [exact(x, weight, scale, bias)], TOLERANCES[dtype])


@pytest.mark.parametrize("backend", [NATIVE])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("features", [1, 2, 5, 7, 40])
def test_a_row_does_not_depend_on_its_neighbours(backend, bits, features) -> None:
    weight, scale = integers(bits, features, 224), torch.rand(features, 7)
    stored = pack_int4(weight) if bits == 4 else weight
    x = torch.randn(9, 224)
    alone = [decode.grouped_linear(row[None], stored, scale, backend=backend) for row in x]
    for rows in (2, 3, 4, 5, 9):
        together = decode.grouped_linear(x[:rows], stored, scale, backend=backend)
        assert torch.equal(together, torch.cat(alone[:rows]))


@pytest.mark.parametrize("backend", [NATIVE])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 6])
def test_the_same_bits_whatever_the_threads(backend, bits, rows, monkeypatch) -> None:
    features, size = 1501, 320  # several tasks, the last a partial one
    weight, scale = integers(bits, features, size), torch.rand(features, size // 32)
    stored = pack_int4(weight) if bits == 4 else weight
    x, bias = torch.randn(rows, size), torch.randn(features)
    monkeypatch.setattr("sambay.ops.decode.native.PARALLEL_BYTES", 0)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = decode.grouped_linear(x, stored, scale, bias, backend=backend)
            found.append(out)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert_alike([found[0]], [exact(x, weight, scale, bias)], TOLERANCES[torch.float32])


@pytest.mark.parametrize("backend", [NATIVE])
def test_weights_and_scales_that_are_parts_of_larger_ones(backend) -> None:
    weight, scale = integers(4, 10, 128), torch.rand(10, 9)[:, 1:5]
    stored = torch.cat((pack_int4(weight), pack_int4(weight)), dim=1)[:, :64]
    x = torch.randn(3, 128)
    out = decode.grouped_linear(x, stored, scale, backend=backend)
    expected = exact(x, weight, scale, torch.zeros(10))
    assert_alike([out], [expected], TOLERANCES[torch.float32])
    half = decode.grouped_linear(x, stored[::2], scale[::2].half(), backend=backend)
    assert_alike([half], [exact(x, weight, scale.half(), torch.zeros(10))[:, ::2]], 3e-6)


def test_what_does_not_belong_together_is_noticed() -> None:
    x, weight = torch.randn(2, 96), integers(8, 5, 96)
    for scale in (torch.ones(5, 2), torch.ones(4, 3), torch.ones(5, 6)):  # 48, other rows, 16
        with pytest.raises(AssertionError):
            decode.grouped_linear(x, weight, scale)
    with pytest.raises(AssertionError):
        decode.grouped_linear(x, pack_int4(weight // 16)[:, :32], torch.ones(5, 3))
