"""What a decode step does between mixers, in C++ against its definitions in float64.

Tolerances as in test_decode: sums of a few hundred float32 values, and results that are rounded to
bfloat16 once.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sambay.errors import BackendUnavailable
from sambay.ops import decode
from sambay.ops.decode import reference_rows as reference
from tests.numerics.twins import NATIVE, assert_alike

pytestmark = [pytest.mark.parametrize("backend", [NATIVE])]
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 4e-3}
DTYPES = [torch.float32, torch.bfloat16]
SIZES = [5, 96, 203, 4101]  # whole vectors and not, one task and several


def of(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_embedding(backend, dtype, size):
    table = of(dtype, 7, size + 3)[:, :size]
    tokens = torch.tensor([6, 0, 3, 3])
    out = decode.embed_rows(tokens, table, factor=1.7, backend=backend)
    assert out.dtype == torch.float32
    assert_alike([out], [table.double()[tokens] * 1.7], 3e-7)


def test_what_is_no_token_is_nan(backend):
    out = decode.embed_rows(torch.tensor([7, 1, -1]), of(torch.float32, 7, 9), backend=backend)
    assert out.isnan().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_norms(backend, x_dtype, dtype, centred, size):
    # Rows of a wider tensor, and a mean that is not small beside the deviations.
    x = (of(torch.float32, 3, size + 2) + 0.8).to(x_dtype)[:, 2:]
    weight, bias = of(dtype, size), of(dtype, size) if centred else None
    options = {"eps": 1e-3, "centred": centred, "factor": 0.3}
    out = decode.norm_rows(x, weight, bias, **options, backend=backend)
    assert out.dtype == dtype
    wide_bias = None if bias is None else bias.double()
    cast = x.to(dtype).double()
    expected = reference.norm(cast, weight.double(), wide_bias, 1e-3, 0.3, centred)
    assert_alike([out], [expected], TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_gates(backend, dtype, size):
    gate, value = (4 * of(dtype, 3, 2 * size + 1)).split((size, size + 1), dim=1)
    out = decode.gate_rows(gate, value[:, :size], backend=backend)
    assert out.dtype == dtype
    expected = reference.gate(gate.double(), value[:, :size].double())
    assert_alike([out], [expected], TOLERANCES[dtype])
    strange = torch.tensor([[float("-inf"), float("nan"), 200.0, -200.0]])
    out = decode.gate_rows(strange, torch.ones(1, 4), backend=backend)
    assert out[0, 1].isnan()
    assert out[0, 2:].tolist() == [200, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums(backend, dtype):
    x, y = of(torch.float32, 3, 77), of(dtype, 3, 80)[:, :77]
    out = decode.add_rows(x, y, factor=0.3, backend=backend)
    assert out.dtype == torch.float32
    assert_alike([out], [x.double() + 0.3 * y.double()], 3e-7)


def test_places(backend):
    lengths = torch.tensor([0, 1, 5, 6, 12])
    columns, seen = decode.slot_places(lengths, backend=backend)
    assert (columns.tolist(), seen.tolist()) == ([-1, 0, 4, 5, 11], [0, 1, 5, 6, 12])
    for ring in (1, 5):
        found = decode.slot_places(lengths, ring, backend=backend)
        expected = reference.places(lengths, ring)
        assert [x.tolist() for x in found] == [x.tolist() for x in expected]
        assert found[0].tolist() == [-1, *(column % ring for column in (0, 4, 5, 11))]
        assert found[1].tolist() == [min(length, ring) for length in lengths.tolist()]
    decode.count_columns(lengths[:4], backend=backend)
    assert lengths.tolist() == [0, 2, 6, 7, 12]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("half", [3, 24])
def test_rotation(backend, dtype, half):
    columns = torch.tensor([0, 17, 30_000])
    frequencies = 10_000 ** (-torch.arange(half) / half)
    turns = decode.rotary_turns(columns, frequencies, backend=backend)
    # Of the same float32 angle.
    angles = (columns.float()[:, None] * frequencies).double()
    assert_alike(list(turns), [angles.cos(), angles.sin()], 3e-7)
    heads = of(dtype, 3, 10 * half).unflatten(-1, (5, 2 * half))[:, 1:4]
    out = decode.rotate_heads(heads, *turns, backend=backend)
    assert out.dtype == dtype
    expected = reference.rotate(heads.double(), *(turn.double() for turn in turns))
    assert_alike([out], [expected], TOLERANCES[dtype])


def test_other_types_are_left_to_the_definition(backend):
    x, weight = of(torch.float64, 2, 9), of(torch.float64, 9)
    assert decode.norm_rows(x, weight, eps=1e-5).dtype == torch.float64
    with pytest.raises(BackendUnavailable, match="float32 and bfloat16"):
        decode.norm_rows(x, weight, eps=1e-5, backend=backend)
    with pytest.raises(BackendUnavailable, match="contiguous int64"):
        decode.slot_places(torch.tensor([1, 2]).int(), backend=backend)
    # Mixtures of types that no model has.
    mixed = decode.gate_rows(of(torch.float32, 2, 9), of(torch.float64, 2, 9))
    assert mixed.dtype == torch.float64
