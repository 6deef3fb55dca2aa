"""The selective scan: every backend against the loop that defines it, and what it promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sambay.ops.native import library
from sambay.ops.selective_scan import chunked
from tests.numerics.scans import in_float64, make_inputs, scan_with
from tests.numerics.twins import NATIVE, assert_alike, outputs_and_gradients

FAST = ["torch", NATIVE]
ALL = ["reference", *FAST]
# (rows, length, channels, states): odd sizes, one token, chunk borders, more than one group of
# channels per row, and more states than a pass of the kernel takes.
SHAPES = [
    (2, 1, 5, 1),
    (1, 2, 17, 3),
    (2, 63, 48, 16),
    (1, 64, 17, 16),
    (3, 100, 5, 3),
    (2, 1000, 5, 16),
    (1, 33, 300, 5),
    (2, 40, 160, 23),
]


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("resets", [False, True], ids=["one document", "resets"])
@pytest.mark.parametrize("initial", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference_in_values_and_gradients(shape, initial, resets, backend):
    inputs = make_inputs(*shape, initial=initial, resets=resets)
    expected = outputs_and_gradients(scan_with("reference"), in_float64(inputs))
    assert_alike(outputs_and_gradients(scan_with(backend), inputs), expected, 5e-6)


@pytest.mark.parametrize("resets", [False, True], ids=["one document", "resets"])
def test_the_torch_backend_equals_the_reference_in_float64(resets):
    inputs = make_inputs(2, 70, 5, 3, torch.float64, resets=resets)
    expected = outputs_and_gradients(scan_with("reference"), inputs)
    assert_alike(outputs_and_gradients(scan_with("torch"), inputs), expected, 1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_are_those_of_finite_differences(backend):
    inputs = make_inputs(1, 34, 2, 2, torch.float64, resets=True)
    short = [tensor[:, -5:] if i in (0, 1, 3, 4, 8) else tensor for i, tensor in enumerate(inputs)]
    for some in (short, inputs) if backend == "torch" else (short,):
        leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in some]
        assert torch.autograd.gradcheck(scan_with(backend), leaves, fast_mode=some is inputs)


@pytest.mark.parametrize("backend", FAST)
def test_bfloat16_stays_close_to_float32(backend):
    inputs = make_inputs(2, 100, 48, 16, torch.bfloat16, resets=True)
    expected = outputs_and_gradients(
        scan_with("reference"),
        [None if t is None else t.float() if t.is_floating_point() else t for t in inputs],
    )
    actual = outputs_and_gradients(scan_with(backend), inputs)
    dtypes = [tensor.dtype for tensor in actual]
    half, full = torch.bfloat16, torch.float32
    assert dtypes == [half, full, half, half, full, half, half, full, full, full]
    assert_alike(actual, expected, 1e-2)


@pytest.mark.parametrize("lanes", [1, 2, 3, 6, 12])
def test_a_recurrence_in_lanes_equals_one_after_another(lanes):
    decay, inputs, state = torch.rand(12, 3, 4), torch.randn(12, 3, 4), torch.randn(3, 4)
    expected, s = [], state
    for t in range(12):
        s = decay[t] * s + inputs[t]
        expected.append(s)
    actual = chunked.recurrence(decay, inputs.clone(), state, lanes)
    torch.testing.assert_close(actual, torch.stack(expected))


@pytest.mark.parametrize("backend", FAST)
def test_the_chunked_scan_in_lanes_equals_the_reference(backend, monkeypatch):
    monkeypatch.setattr(chunked, "_lanes", lambda tensor: 2 if len(tensor) % 2 == 0 else 1)
    inputs = make_inputs(2, 100, 5, 3, resets=True)
    expected = outputs_and_gradients(scan_with("reference"), in_float64(inputs))
    assert_alike(outputs_and_gradients(scan_with(backend), inputs), expected, 5e-6)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("border", [1, 31, 32, 57, 99])
def test_a_sequence_may_be_scanned_in_two_parts(border, backend):
    x, delta, A, B, C, D, bias, initial, resets = make_inputs(2, 100, 17, 16, resets=True)
    run = scan_with(backend)
    y, final = run(x, delta, A, B, C, D, bias, initial, resets)

    def part(tokens: slice, state: Tensor | None):
        x_, delta_, B_, C_, resets_ = (t[:, tokens] for t in (x, delta, B, C, resets))
        return run(x_, delta_, A, B_, C_, D, bias, state, resets_)

    y1, middle = part(slice(0, border), initial)
    y2, end = part(slice(border, None), middle)
    assert_alike([torch.cat([y1, y2], 1), end], [y, final], 1e-6)


@pytest.mark.parametrize("backend", ALL)
def test_a_reset_separates_documents_in_values_and_gradients(backend):
    lengths = [1, 37, 32, 30]
    inputs = make_inputs(1, sum(lengths), 17, 5)
    starts = torch.zeros(1, sum(lengths), dtype=torch.bool)
    starts[0, [0, 1, 38, 70]] = True

    def packed(x, delta, A, B, C, D, bias, initial, _):
        return scan_with(backend)(x, delta, A, B, C, D, bias, initial, starts)

    def separate(x, delta, A, B, C, D, bias, initial, _):
        parts = zip(*(t.split(lengths, 1) for t in (x, delta, B, C)), strict=True)
        results = [scan_with(backend)(x, d, A, B, C, D, bias, None, None) for x, d, B, C in parts]
        return torch.cat([y for y, _ in results], 1), results[-1][1] + 0 * initial

    actual, expected = (
        outputs_and_gradients(packed, inputs),
        outputs_and_gradients(separate, inputs),
    )
    assert_alike(actual, expected, 1e-6)
    assert not actual[-1].any(), "a reset before the first token drops the initial state"


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_leaves_the_state_bitwise_unchanged(dtype, backend):
    x, delta, A, B, C, D, bias, initial, _ = make_inputs(2, 40, 17, 16, dtype)
    delta[:, :] = -1e4
    _, final = scan_with(backend)(x, delta, A, B, C, D, bias, initial, None)
    assert torch.equal(final, initial)


@pytest.mark.parametrize("backend", ALL)
def test_padding_before_a_row_changes_nothing(backend):
    x, delta, A, B, C, D, bias, _, _ = make_inputs(1, 50, 17, 16)
    y, final = scan_with(backend)(x, delta, A, B, C, D, bias, None, None)
    x, B, C = (torch.cat([torch.randn_like(t[:, :7]), t], 1) for t in (x, B, C))
    delta = torch.cat([torch.full_like(delta[:, :7], -1e4), delta], 1)
    y_padded, final_padded = scan_with(backend)(x, delta, A, B, C, D, bias, None, None)
    assert_alike([y_padded[:, 7:], final_padded], [y, final], 1e-6)


@pytest.mark.parametrize("backend", FAST)
def test_extreme_decays_stay_finite_and_right(backend):
    inputs = make_inputs(2, 70, 48, 16)
    _, delta, A, *_ = inputs
    A[:, ::2] = -1e4
    A[:, 1] = -1e-8
    delta[0, ::3] = 1e4
    delta[1, ::3] = -90.0
    delta[1, 1::3] = 30.0
    expected = outputs_and_gradients(scan_with("reference"), in_float64(inputs))
    actual = outputs_and_gradients(scan_with(backend), inputs)
    assert all(torch.isfinite(tensor).all() for tensor in actual)
    assert_alike(actual, expected, 1e-5)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("which", range(7))
def test_nan_is_not_hidden(which, backend):
    inputs = make_inputs(2, 40, 17, 3)
    tensor = inputs[which]
    tensor[(0,) * tensor.ndim] = float("nan")
    y, final = scan_with(backend)(*inputs)
    assert y[0].isnan().any()
    if which in (0, 1, 3, 4):
        assert not y[1].isnan().any(), "rows are independent"
        assert not final[1].isnan().any()


@pytest.mark.parametrize("backend", ALL)
def test_earlier_outputs_do_not_depend_on_later_tokens(backend):
    inputs = make_inputs(1, 50, 5, 3)
    y, _ = scan_with(backend)(*inputs)
    for index in (0, 1, 3, 4):
        inputs[index][:, 33:] += 1
    y_changed, _ = scan_with(backend)(*inputs)
    assert torch.equal(y_changed[:, :33], y[:, :33])
    assert not torch.equal(y_changed[:, 33:], y[:, 33:])


@pytest.mark.parametrize("backend", [NATIVE])
def test_results_do_not_depend_on_the_number_of_threads(backend):
    inputs = make_inputs(3, 100, 300, 16, resets=True)
    expected = outputs_and_gradients(scan_with(backend), inputs)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        actual = outputs_and_gradients(scan_with(backend), inputs)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("used", [0, 1], ids=["y", "final state"])
def test_one_output_may_go_unused(used, backend):
    def only(backend):
        return lambda *inputs: (scan_with(backend)(*inputs)[used],)

    inputs = make_inputs(2, 40, 17, 3)
    expected = outputs_and_gradients(only("reference"), in_float64(inputs))
    assert_alike(outputs_and_gradients(only(backend), inputs), expected, 5e-6)


@pytest.mark.parametrize("backend", FAST)
def test_any_strides_are_read_correctly(backend):
    inputs = make_inputs(2, 40, 17, 3)
    x, delta, A, B, C, D, bias, initial, _ = inputs
    odd = [
        x.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([delta, delta], -1)[..., 17:],
        A.t().contiguous().t(),
        B[:1].expand(2, -1, -1),
        C.repeat(1, 1, 2)[..., ::2],
        D[:1].expand(17),
        bias.flip(0).flip(0),
        initial.transpose(0, 2).contiguous().transpose(0, 2),
        (torch.rand(40) < 0.1).expand(2, 40),
    ]
    expected = outputs_and_gradients(scan_with("reference"), in_float64(odd))
    assert_alike(outputs_and_gradients(scan_with(backend), odd), expected, 5e-6)


def test_slices_of_a_projection_are_not_copied():
    fused = torch.randn(2, 7, 12)
    part = fused[..., 4:9]
    assert library.rows_of(part) is part
