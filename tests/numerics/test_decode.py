"""The operations of a decode step in C++ against their definitions in float64.

Tolerances: float32 sums of a few hundred products differ from float64 by some 1e-7 of the largest
result, in another order by as much again; 3e-6 leaves room for long sums and exponentials. A
bfloat16 result is rounded once, by at most 2^-9 = 0.2 % of itself; 0.4 % allows for a tie that
falls to the other side.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sambay.errors import BackendUnavailable
from sambay.model import LanguageModel
from sambay.ops import decode
from sambay.ops.attention import attention
from sambay.ops.decode import reference
from sambay.ops.differential import differential_attention
from tests.numerics.twins import NATIVE, assert_alike
from tests.tiny import allocate, random_ids, tiny_model

pytestmark = [pytest.mark.parametrize("backend", [NATIVE])]
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 4e-3}
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)]
DTYPES += [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
# B, H, K, S, P: whole vectors and not, one part and several, groups of one and of many.
SHAPES = [(3, 8, 4, 20, 6), (1, 8, 2, 1100, 48), (2, 24, 2, 513, 20), (2, 4, 4, 9, 17)]


def of(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(dtype)


def cache_of(dtype: torch.dtype, B: int, K: int, S: int, P: int, lengths: Tensor) -> list[Tensor]:
    """Keys and values that are only partly written, in a larger buffer; the rest is NaN."""
    found = []
    for _ in range(2):
        buffer = of(dtype, B, K, S + 3, P)
        for b, length in enumerate(lengths.tolist()):
            buffer[b, :, length:] = float("nan")
        found.append(buffer[:, :, :S])
    return found


def lengths_of(B: int, S: int) -> Tensor:
    """All columns, about half of them, none."""
    return torch.tensor([S, (S + 1) // 2, 0][:B])


@pytest.mark.parametrize(("dtype", "cache_dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(backend, dtype, cache_dtype, shape):
    B, H, K, S, P = shape
    lengths = lengths_of(B, S)
    # Queries as a projection leaves them, heads of a wider row.
    q = of(dtype, B, 2 * H * P)[:, H * P :].unflatten(-1, (H, P))
    k, v = cache_of(cache_dtype, B, K, S, P, lengths)
    out = decode.decode_attention(q, k, v, lengths.int(), scale=P**-0.5, backend=backend)
    expected = reference.attend(q.double(), k, v, lengths, P**-0.5)
    assert out.dtype == dtype
    assert_alike([out], [expected], TOLERANCES[dtype])
    assert not out[lengths == 0].any()


@pytest.mark.parametrize(("dtype", "cache_dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_differential_attention(backend, dtype, cache_dtype, shape):
    B, H, K, S, P = shape
    lengths = lengths_of(B, S)
    q, norm_weight = of(dtype, B, H, P), of(dtype, 2 * P)
    k, v = cache_of(cache_dtype, B, K, S, P, lengths)
    call = {"scale": P**-0.5, "eps": 1e-3, "factor": 0.7}
    weight = torch.tensor(0.6)
    out = decode.decode_differential_attention(
        q, k, v, lengths, weight, norm_weight, **call, backend=backend
    )
    expected = reference.attend_differential(
        q.double(), k, v, lengths, weight, norm_weight, *call.values()
    )
    assert out.shape == (B, H * P)
    # The difference of two maps, divided by its size: errors of both grow by a small factor.
    assert_alike([out], [expected], 3 * TOLERANCES[dtype])
    assert not out[lengths == 0].any()


def test_the_definitions_are_those_of_the_full_operations(backend):
    q, k, v = of(torch.float64, 2, 8, 6), *(of(torch.float64, 2, 4, 11, 6) for _ in range(2))
    lengths, weight, norm_weight = torch.tensor([11, 7]), torch.tensor(0.6), of(torch.float64, 12)
    plain = reference.attend(q, k, v, lengths, 0.4)
    paired = reference.attend_differential(q, k, v, lengths, weight, norm_weight, 0.4, 1e-3, 0.7)
    for b, length in enumerate(lengths.tolist()):
        row = q[b, None, :, None], k[b, None, :, :length], v[b, None, :, :length]
        expected = attention(*row, scale=0.4, backend="reference")
        torch.testing.assert_close(plain[b], expected[0, :, 0])
        expected = differential_attention(*row, weight.double(), scale=0.4, backend="reference")
        expected = 0.7 * torch.nn.functional.rms_norm(expected, (12,), norm_weight, 1e-3)
        torch.testing.assert_close(paired[b], expected.transpose(1, 2).flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "padded"), [(None, False), (4, False), (None, True), (4, True)])
def test_single_queries_of_the_full_operations(backend, dtype, window, padded):
    """Left padding and windows, as the rows of a cached batch have them."""
    q, k, v = of(dtype, 3, 8, 1, 6), of(dtype, 3, 4, 9, 6), of(dtype, 3, 4, 9, 6)
    starts = torch.tensor([0, 3, 8]) if padded else None
    call = {"scale": 0.4, "window": window, "starts_B": starts}
    exact, weight = (x.double() for x in (q, k, v)), torch.tensor(0.6)
    q64, k64, v64 = exact
    with torch.no_grad():
        out = attention(q, k, v, **call, backend=backend)
        expected = attention(q64, k64, v64, **call, backend="reference")
        assert_alike([out], [expected], TOLERANCES[dtype])
        out = differential_attention(q, k, v, weight.to(dtype), **call)
        weight = weight.to(dtype).double()
        expected = differential_attention(q64, k64, v64, weight, **call, backend="reference")
        assert_alike([out], [expected], 3 * TOLERANCES[dtype])


def test_attention_of_several_queries_or_with_gradients_is_refused(backend):
    q, k = torch.randn(1, 2, 2, 4), torch.randn(1, 2, 3, 4)
    with torch.no_grad(), pytest.raises(BackendUnavailable, match="single queries"):
        attention(q, k, k, scale=1.0, backend=backend)
    with pytest.raises(BackendUnavailable, match="without gradients"):
        attention(q[:, :, :1], k, k, scale=1.0, backend=backend)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_columns_are_stored(backend, cache_dtype, index):
    keys, values = (of(torch.float32, 3, 8, 5).chunk(2, dim=1)[i] for i in range(2))
    columns = torch.tensor([6, -1, 0], dtype=index)
    before = [of(cache_dtype, 3, 4, 7, 5) for _ in range(2)]
    after, expected = ([x.clone() for x in before] for _ in range(2))
    decode.store_columns(keys, values, *after, columns, backend=backend)
    for new, cache in ((keys, expected[0]), (values, expected[1])):
        cache[0, :, 6], cache[2, :, 0] = new[0].to(cache_dtype), new[2].to(cache_dtype)
    assert torch.equal(after[0], expected[0])
    assert torch.equal(after[1], expected[1])
    decode.store_columns(keys, values, *before, columns, backend="reference")
    assert torch.equal(before[0], expected[0])


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 9, 32])
@pytest.mark.parametrize(("size", "features"), [(37, 50), (64, 9), (3, 1)])
def test_linear(backend, dtype, weight_dtype, rows, size, features):
    x, weight = of(dtype, rows, size + 1)[:, 1:], of(weight_dtype, features, size)
    for bias in (None, of(weight_dtype, features)):
        out = decode.skinny_linear(x, weight, bias, backend=backend)
        exact = None if bias is None else bias.to(dtype).double()
        assert_alike([out], [reference.linear(x.double(), weight, exact)], TOLERANCES[dtype])
        assert out.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 12])
def test_linear_with_int8_weights(backend, dtype, rows):
    x, scale, bias = of(dtype, rows, 75), torch.rand(21), of(dtype, 21)
    weight = torch.randint(-128, 128, (21, 75), dtype=torch.int8)
    out = decode.skinny_linear(x, weight, bias, scale_F=scale, backend=backend)
    expected = x.double() @ (weight.double() * scale.double()[:, None]).t() + bias.double()
    assert_alike([out], [expected], TOLERANCES[dtype])
    slow = decode.skinny_linear(x, weight, bias, scale_F=scale, backend="reference")
    assert_alike([slow], [expected], TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_neighbours(backend, dtype):
    x, whole = of(dtype, 12, 100), of(dtype, 40, 100)
    # A single row meets narrow weights in another order of summing.
    fewest = 1 if dtype == torch.float32 else 2
    # Rows of weights that are left over when they are taken several at a time, too.
    for features in (40, 17, 13, 5, 1) if backend == "native" else (40,):
        weight = whole[:features]
        together = decode.skinny_linear(x, weight, backend=backend)
        alone = [decode.skinny_linear(rows, weight, backend=backend) for rows in x.split(fewest)]
        assert torch.equal(together, torch.cat(alone)), features
    q, k, v = of(dtype, 3, 4, 16), of(dtype, 3, 2, 600, 16), of(dtype, 3, 2, 600, 16)
    lengths = torch.tensor([600, 20, 513])
    together = decode.decode_attention(q, k, v, lengths, scale=0.25, backend=backend)
    for b in range(3):
        row = (x[b, None] for x in (q, k, v, lengths))
        assert torch.equal(together[b], decode.decode_attention(*row, scale=0.25)[0])


def mamba_inputs(dtype: torch.dtype, B: int, E: int, N: int, R: int, W: int) -> tuple:
    f32 = torch.float32
    inputs = [of(dtype, B, 2 * E)[:, :E], of(dtype, E, W), of(dtype, E)]
    inputs += [of(dtype, R + 2 * N, E) / E**0.5, of(dtype, E, R) / R**0.5]
    inputs += [of(f32, E) - 3, 0.3 * of(f32, E, N), of(f32, E)]
    return inputs, of(f32, B, W - 1, E), of(f32, B, E, N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(3, 70, 5, 7, 4), (1, 130, 16, 24, 4), (9, 64, 3, 20, 2)])
def test_mamba(backend, dtype, sizes):
    inputs, conv, ssm = mamba_inputs(dtype, *sizes)
    exact = [x.double() for x in inputs]
    exact_conv, exact_ssm = conv.double(), ssm.double()
    for _ in range(3):  # so that the inputs kept for later steps are read, too
        y = decode.mamba_step(*inputs, conv_state_BCE=conv, ssm_state_BEN=ssm, backend=backend)
        expected = reference.step_mamba(*exact, exact_conv, exact_ssm)
        assert_alike([y], [expected], TOLERANCES[dtype])
    # Between the rounded inputs and y everything is float32.
    assert_alike([conv, ssm], [exact_conv, exact_ssm], TOLERANCES[torch.float32])


def test_mamba_with_convolution_inputs_in_the_dtype_of_the_activations(backend):
    inputs, conv, ssm = mamba_inputs(torch.bfloat16, 2, 70, 4, 5, 4)
    narrow, wide, same = conv.bfloat16(), conv.bfloat16().float(), ssm.clone()
    y = decode.mamba_step(*inputs, conv_state_BCE=narrow, ssm_state_BEN=ssm, backend=backend)
    z = decode.mamba_step(*inputs, conv_state_BCE=wide, ssm_state_BEN=same, backend=backend)
    assert torch.equal(y, z)
    assert torch.equal(narrow, wide.bfloat16())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_bits_every_time_whatever_the_threads(backend, threads, monkeypatch):
    monkeypatch.setattr("sambay.ops.decode.native.PARALLEL_BYTES", 0)
    torch.set_num_threads(threads)
    torch.manual_seed(5)
    q, k, v = of(torch.float32, 2, 8, 16), *(of(torch.float32, 2, 4, 1300, 16) for _ in range(2))
    x, weight, lengths = (
        of(torch.float32, 2, 96),
        of(torch.float32, 700, 96),
        torch.tensor([1300, 9]),
    )
    inputs, conv, ssm = mamba_inputs(torch.float32, 2, 200, 8, 9, 4)

    def run() -> list[Tensor]:
        states = conv.clone(), ssm.clone()
        one, norm_weight = torch.tensor(0.5), torch.ones(32)
        paired = {"scale": 0.25, "eps": 1e-5, "factor": 0.5}
        return [
            decode.decode_attention(q, k, v, lengths, scale=0.25),
            decode.decode_differential_attention(q, k, v, lengths, one, norm_weight, **paired),
            decode.skinny_linear(x, weight),
            decode.mamba_step(*inputs, conv_state_BCE=states[0], ssm_state_BEN=states[1]),
        ]

    monkeypatch.setattr("sambay.ops.decode.native.PARALLEL_BYTES", 1 << 60)
    expected = run()
    monkeypatch.setattr("sambay.ops.decode.native.PARALLEL_BYTES", 0)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


def test_counted_operations_are_left_to_torch(backend):
    x, weight = torch.randn(2, 5), torch.randn(3, 5)
    with FlopCounterMode(display=False) as counter:
        decode.skinny_linear(x, weight)
        with pytest.raises(BackendUnavailable, match="watches"):
            decode.skinny_linear(x, weight, backend=backend)
    assert counter.get_total_flops() == 2 * 2 * 5 * 3


def greedy(model: LanguageModel, prompt: Tensor, steps: int) -> Tensor:
    cache = allocate(model, len(prompt), prompt.shape[1] + steps)
    ids, found = prompt, []
    with torch.inference_mode():
        for _ in range(steps):
            ids = model(ids, cache=cache, outputs="last")[:, -1].argmax(-1, keepdim=True)
            found.append(ids)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("name", ["transformer++", "sambay", "sambay+da", "samba", "gdny"])
def test_greedy_tokens_are_those_of_the_references(backend, name, monkeypatch):
    model, prompt = tiny_model(name, dtype=torch.float32), random_ids(2, 7)
    fast = greedy(model, prompt, 12)
    monkeypatch.setenv("SAMBAY_REFERENCE", "1")
    assert torch.equal(fast, greedy(model, prompt, 12))
