"""The scan of Mamba-2: the chunked backend against the loop that defines it, and its promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sambay.ops.state_space_dual import chunked, state_space_dual_step
from tests.numerics.duals import make_inputs, scan_with
from tests.numerics.scans import in_float64
from tests.numerics.twins import assert_alike, outputs_and_gradients

ALL = ["reference", "torch"]
# (rows, length, heads, channels, states): one token, chunk borders, odd sizes
SHAPES = [
    (2, 1, 3, 5, 1),
    (1, 2, 5, 3, 7),
    (2, 63, 3, 1, 4),
    (1, 64, 1, 8, 16),
    (2, 65, 3, 5, 4),
    (3, 130, 5, 3, 7),
]


@pytest.mark.parametrize(
    ("initial", "resets"),
    [(False, False), (True, False), (True, True)],
    ids=["from zero", "from a state", "from a state, resets"],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference_in_values_and_gradients(shape, initial, resets):
    inputs = make_inputs(*shape, initial=initial, resets=resets)
    expected = outputs_and_gradients(scan_with("reference"), in_float64(inputs))
    assert_alike(outputs_and_gradients(scan_with("torch"), inputs), expected, 5e-6)
    tight = outputs_and_gradients(scan_with("torch"), in_float64(inputs))
    assert_alike(tight, expected, 1e-12)


@pytest.mark.parametrize("backend", ALL)
def test_gradients_are_those_of_finite_differences(backend, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 3)
    inputs = make_inputs(1, 5, 2, 1, 2, torch.float64)
    inputs[8] = torch.tensor([[False, True, False, False, False]])
    leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in inputs]
    assert torch.autograd.gradcheck(scan_with(backend), leaves, fast_mode=True)


def test_bfloat16_stays_close_to_float32():
    inputs = make_inputs(2, 100, 5, 8, 16, torch.bfloat16, resets=True)
    expected = outputs_and_gradients(
        scan_with("reference"),
        [None if t is None else t.float() if t.is_floating_point() else t for t in inputs],
    )
    actual = outputs_and_gradients(scan_with("torch"), inputs)
    half, full = torch.bfloat16, torch.float32
    dtypes = [tensor.dtype for tensor in actual]
    assert dtypes == [half, full, half, half, full, half, half, full, full, full]
    assert_alike(actual, expected, 1e-2)


@pytest.mark.parametrize("length", [48, 90])
def test_several_chunks_at_once_equal_the_reference(length, monkeypatch):
    monkeypatch.setattr(chunked, "_chunks_at_once", lambda x: 3)
    monkeypatch.setattr(chunked, "CHUNK", 16)
    inputs = make_inputs(2, length, 3, 5, 4, torch.float64, resets=True)
    inputs[8][:, 14:50] = False  # a whole chunk without a reset, through which states pass
    expected = outputs_and_gradients(scan_with("reference"), inputs)
    assert_alike(outputs_and_gradients(scan_with("torch"), inputs), expected, 1e-12)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("border", [1, 63, 64, 99])
def test_a_sequence_may_be_scanned_in_two_parts(border, backend):
    x, delta, A, B, C, D, bias, initial, resets = make_inputs(2, 100, 3, 5, 4, resets=True)
    run = scan_with(backend)
    y, final = run(x, delta, A, B, C, D, bias, initial, resets)

    def part(tokens: slice, state: Tensor | None):
        x_, delta_, B_, C_, resets_ = (t[:, tokens] for t in (x, delta, B, C, resets))
        return run(x_, delta_, A, B_, C_, D, bias, state, resets_)

    y1, middle = part(slice(0, border), initial)
    y2, end = part(slice(border, None), middle)
    assert_alike([torch.cat([y1, y2], 1), end], [y, final], 2e-6)


@pytest.mark.parametrize("backend", ALL)
def test_a_reset_separates_documents_in_values_and_gradients(backend):
    lengths = [1, 37, 26, 40]  # the last begins with the second chunk
    inputs = make_inputs(1, sum(lengths), 3, 5, 4)
    starts = torch.zeros(1, sum(lengths), dtype=torch.bool)
    starts[0, [0, 1, 38, 64]] = True

    def packed(x, delta, A, B, C, D, bias, initial, _):
        return scan_with(backend)(x, delta, A, B, C, D, bias, initial, starts)

    def separate(x, delta, A, B, C, D, bias, initial, _):
        parts = zip(*(t.split(lengths, 1) for t in (x, delta, B, C)), strict=True)
        results = [scan_with(backend)(x, d, A, B, C, D, bias, None, None) for x, d, B, C in parts]
        return torch.cat([y for y, _ in results], 1), results[-1][1] + 0 * initial

    actual = outputs_and_gradients(packed, inputs)
    assert_alike(actual, outputs_and_gradients(separate, inputs), 2e-6)
    assert not actual[-1].any(), "a reset before the first token drops the initial state"


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_leaves_the_state_bitwise_unchanged(dtype, backend):
    x, delta, A, B, C, D, bias, initial, _ = make_inputs(2, 70, 3, 5, 4, dtype)
    delta[:, :] = -1e4
    _, final = scan_with(backend)(x, delta, A, B, C, D, bias, initial, None)
    assert torch.equal(final, initial)


@pytest.mark.parametrize("backend", ALL)
def test_padding_before_a_row_changes_nothing(backend):
    x, delta, A, B, C, D, bias, _, _ = make_inputs(1, 80, 3, 5, 4)
    y, final = scan_with(backend)(x, delta, A, B, C, D, bias, None, None)
    x, B, C = (torch.cat([torch.randn_like(t[:, :7]), t], 1) for t in (x, B, C))
    delta = torch.cat([torch.full_like(delta[:, :7], -1e4), delta], 1)
    y_padded, final_padded = scan_with(backend)(x, delta, A, B, C, D, bias, None, None)
    assert_alike([y_padded[:, 7:], final_padded], [y, final], 2e-6)


def test_extreme_decays_stay_finite_and_right():
    inputs = make_inputs(2, 100, 5, 3, 4)
    _, delta, A, *_ = inputs
    A[::2] = -1e4
    A[1] = -1e-8
    delta[0, ::3] = 1e4
    delta[1, ::3] = -90.0
    delta[1, 1::3] = 30.0
    expected = outputs_and_gradients(scan_with("reference"), in_float64(inputs))
    actual = outputs_and_gradients(scan_with("torch"), inputs)
    assert all(torch.isfinite(tensor).all() for tensor in actual)
    assert_alike(actual, expected, 1e-5)


def test_a_large_sum_of_decays_does_not_blur_the_small_ones():
    """A difference of float32 sums near 1e7 would be off by more than the whole exponent."""
    inputs = make_inputs(1, 60, 1, 3, 4, initial=False)
    inputs[2].fill_(-1.0)
    inputs[1][:, :] = -3.0
    inputs[1][:, 1] = 1e7
    expected, _ = scan_with("reference")(*in_float64(inputs))
    y, _ = scan_with("torch")(*inputs)
    assert_alike([y[:, 2:]], [expected[:, 2:]], 2e-6)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("which", range(7))
def test_nan_is_not_hidden(which, backend):
    inputs = make_inputs(2, 70, 3, 5, 4)
    tensor = inputs[which]
    tensor[(0,) * tensor.ndim] = float("nan")
    y, final = scan_with(backend)(*inputs)
    assert y[0].isnan().any()
    if which in (0, 1, 3, 4):
        assert not y[1].isnan().any(), "rows are independent"
        assert not final[1].isnan().any()


@pytest.mark.parametrize("backend", ALL)
def test_earlier_outputs_do_not_depend_on_later_tokens(backend):
    inputs = make_inputs(1, 80, 3, 5, 4)
    y, _ = scan_with(backend)(*inputs)
    for index in (0, 1, 3, 4):
        inputs[index][:, 33:] += 1
    y_changed, _ = scan_with(backend)(*inputs)
    torch.testing.assert_close(y_changed[:, :33], y[:, :33], rtol=0, atol=1e-6)
    assert not torch.isclose(y_changed[:, 33:], y[:, 33:]).all()


@pytest.mark.parametrize("used", [0, 1], ids=["y", "final state"])
def test_one_output_may_go_unused(used):
    def only(backend):
        return lambda *inputs: (scan_with(backend)(*inputs)[used],)

    inputs = make_inputs(2, 70, 3, 5, 4)
    expected = outputs_and_gradients(only("reference"), in_float64(inputs))
    assert_alike(outputs_and_gradients(only("torch"), inputs), expected, 5e-6)


def test_any_strides_are_read_correctly():
    x, delta, A, B, C, D, bias, initial, _ = make_inputs(2, 70, 3, 5, 4)
    odd = [
        x.transpose(1, 3).contiguous().transpose(1, 3),
        torch.cat([delta, delta], -1)[..., 3:],
        A.repeat(2)[::2],
        B[:1].expand(2, -1, -1),
        C.repeat(1, 1, 2)[..., ::2],
        D[:1].expand(3),
        bias.flip(0).flip(0),
        initial.transpose(0, 3).contiguous().transpose(0, 3),
        (torch.rand(70) < 0.1).expand(2, 70),
    ]
    expected = outputs_and_gradients(scan_with("reference"), in_float64(odd))
    assert_alike(outputs_and_gradients(scan_with("torch"), odd), expected, 5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_steps_equal_the_scan(dtype):
    x, delta, A, B, C, D, bias, initial, _ = make_inputs(3, 6, 5, 3, 7, dtype)
    delta[:, 2] = -1e4  # a token of padding
    expected, final = scan_with("reference")(x, delta, A, B, C, D, bias, initial, None)
    state = initial.clone()
    outputs = [
        state_space_dual_step(
            x[:, t], delta[:, t], A, B[:, t], C[:, t], D, delta_bias_H=bias, state_BHPN=state
        )
        for t in range(6)
    ]
    y = torch.stack(outputs, 1)
    assert y.dtype == dtype
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]
    assert_alike([y, state], [expected, final], tolerance)
