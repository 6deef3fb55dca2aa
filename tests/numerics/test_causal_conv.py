"""The causal convolution: every backend against the loop that defines it, and what it promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu

from sambay.errors import BackendUnavailable
from sambay.ops.causal_conv import causal_conv, causal_conv_step
from sambay.ops.native import library
from tests.numerics.twins import NATIVE, assert_alike, outputs_and_gradients

FAST = ["torch", NATIVE]
ALL = ["reference", *FAST]
# (rows, length, channels, width): sequences shorter than the width, the borders of the kernel's
# tasks (64 tokens, 1024 channels), a width it does not unroll, and none at all.
SHAPES = [
    (2, 1, 5, 4),
    (1, 2, 17, 4),
    (2, 3, 17, 5),
    (2, 63, 48, 4),
    (1, 64, 17, 3),
    (3, 100, 5, 4),
    (2, 130, 17, 1),
    (1, 70, 1100, 4),
    (1, 7, 3, 12),
]


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_inputs(
    rows: int,
    length: int,
    channels: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    *,
    initial: bool = True,
    resets: bool = False,
) -> list[Tensor | None]:
    """Inputs as a mixer makes them: x is the first half of a projection."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        torch.randn(rows, length, 2 * channels, dtype=dtype)[..., :channels],
        torch.randn(channels, width, dtype=compute),
        torch.randn(channels, dtype=compute),
        torch.randn(rows, width - 1, channels, dtype=compute) if initial else None,
        torch.rand(rows, length) < 0.2 if resets else None,
    ]


def conv_with(backend: str | None):
    def run(x, weight, bias, initial_state, resets):
        return (
            causal_conv(
                x,
                weight,
                bias,
                initial_state_BCE=initial_state,
                resets_BT=resets,
                backend=backend,
            ),
        )

    return run


def in_float64(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [
        tensor.double() if tensor is not None and tensor.is_floating_point() else tensor
        for tensor in inputs
    ]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("resets", [False, True], ids=["one document", "resets"])
@pytest.mark.parametrize("initial", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference_in_values_and_gradients(shape, initial, resets, backend):
    inputs = make_inputs(*shape, initial=initial, resets=resets)
    expected = outputs_and_gradients(conv_with("reference"), in_float64(inputs))
    assert_alike(outputs_and_gradients(conv_with(backend), inputs), expected, 2e-6)


def test_the_reference_is_torchs_padded_depthwise_convolution():
    x, weight, bias, *_ = make_inputs(2, 20, 6, 4, initial=False)
    padded = torch.nn.functional.pad(x.transpose(1, 2), (3, 0))
    expected = silu(conv1d(padded, weight[:, None], bias, groups=6)).transpose(1, 2)
    torch.testing.assert_close(causal_conv(x, weight, bias, backend="reference"), expected)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_are_those_of_finite_differences(backend):
    inputs = make_inputs(2, 9, 3, 4, torch.float64, resets=True)
    leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in inputs]
    assert torch.autograd.gradcheck(conv_with(backend), leaves)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_bfloat16_stays_close_to_float32(parameters, backend):
    inputs = make_inputs(2, 100, 48, 4, torch.bfloat16, resets=True)
    inputs[1:4] = [tensor.to(parameters) for tensor in inputs[1:4]]
    full = [*(tensor.float() for tensor in inputs[:4]), inputs[4]]
    expected = outputs_and_gradients(conv_with("reference"), full)
    actual = outputs_and_gradients(conv_with(backend), inputs)
    assert [t.dtype for t in actual] == [torch.bfloat16, torch.bfloat16, *[parameters] * 3]
    assert_alike(actual, expected, 1e-2)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("border", [1, 2, 3, 63, 64, 65, 98])
def test_a_sequence_may_be_convolved_in_two_parts(border, backend):
    x, weight, bias, initial, resets = make_inputs(2, 100, 17, 4, resets=True)
    (y,) = conv_with(backend)(x, weight, bias, initial, resets)
    resets[:, border - 3 if border > 3 else 0 : border + 1] = False
    (y,) = conv_with(backend)(x, weight, bias, initial, resets)
    earlier = torch.cat([initial, x[:, :border]], 1)[:, -3:]
    (y1,) = conv_with(backend)(x[:, :border], weight, bias, initial, resets[:, :border])
    (y2,) = conv_with(backend)(x[:, border:], weight, bias, earlier, resets[:, border:])
    assert_alike([torch.cat([y1, y2], 1)], [y], 1e-6)


@pytest.mark.parametrize("backend", ALL)
def test_a_reset_separates_documents_in_values_and_gradients(backend):
    lengths = [1, 2, 61, 3, 30]  # one border falls between two tasks of the kernel
    inputs = make_inputs(1, sum(lengths), 17, 4)
    starts = torch.zeros(1, sum(lengths), dtype=torch.bool)
    starts[0, [0, 1, 3, 64, 67]] = True

    def packed(x, weight, bias, initial, _):
        return conv_with(backend)(x, weight, bias, initial, starts)

    def separate(x, weight, bias, initial, _):
        results = [
            conv_with(backend)(part, weight, bias, None, None)[0] for part in x.split(lengths, 1)
        ]
        return (torch.cat(results, 1) + 0 * initial.sum(),)

    actual, expected = (
        outputs_and_gradients(packed, inputs),
        outputs_and_gradients(separate, inputs),
    )
    assert_alike(actual, expected, 1e-6)
    assert not actual[-1].any(), "a reset before the first token drops the initial state"


@pytest.mark.parametrize("backend", ALL)
def test_earlier_outputs_do_not_depend_on_later_tokens(backend):
    x, weight, bias, initial, _ = make_inputs(1, 90, 5, 4)
    (y,) = conv_with(backend)(x, weight, bias, initial, None)
    x[:, 66:] += 1
    (changed,) = conv_with(backend)(x, weight, bias, initial, None)
    assert torch.equal(changed[:, :66], y[:, :66])
    assert (changed[:, 66] != y[:, 66]).all()


@pytest.mark.parametrize("backend", FAST)
def test_large_inputs_stay_finite_and_right(backend):
    inputs = make_inputs(2, 70, 17, 4)
    inputs[0][:, ::2] *= 1e4
    expected = outputs_and_gradients(conv_with("reference"), in_float64(inputs))
    actual = outputs_and_gradients(conv_with(backend), inputs)
    assert all(torch.isfinite(tensor).all() for tensor in actual)
    assert_alike(actual, expected, 1e-5)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("which", range(4))
def test_nan_is_not_hidden(which, backend):
    inputs = make_inputs(2, 40, 17, 4)
    inputs[which][(0,) * inputs[which].ndim] = float("nan")
    (y,) = conv_with(backend)(*inputs)
    assert y[0, :, 0].isnan().any()
    assert not y[:, :, 1:].isnan().any(), "channels are independent"


@pytest.mark.parametrize("backend", [NATIVE])
def test_results_do_not_depend_on_the_number_of_threads(backend):
    inputs = make_inputs(3, 200, 300, 4, resets=True)
    expected = outputs_and_gradients(conv_with(backend), inputs)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        actual = outputs_and_gradients(conv_with(backend), inputs)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", FAST)
def test_any_strides_are_read_correctly(backend):
    x, weight, bias, initial, _ = make_inputs(2, 40, 17, 4)
    odd = [
        x.transpose(1, 2).contiguous().transpose(1, 2),
        weight.t().contiguous().t(),
        bias[:1].expand(17),
        initial.transpose(0, 2).contiguous().transpose(0, 2),
        (torch.rand(40) < 0.1).expand(2, 40),
    ]
    expected = outputs_and_gradients(conv_with("reference"), in_float64(odd))
    assert_alike(outputs_and_gradients(conv_with(backend), odd), expected, 2e-6)


@pytest.mark.parametrize("backend", FAST)
def test_it_can_be_compiled_into_one_graph(backend):
    inputs = make_inputs(2, 40, 17, 4, resets=True)
    torch._dynamo.reset()
    compiled = torch.compile(conv_with(backend), fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(conv_with(backend), inputs)
    assert_alike(outputs_and_gradients(compiled, inputs), expected, 1e-6)


@pytest.mark.parametrize("backend", FAST)
def test_activation_checkpointing_changes_nothing(backend):
    inputs = make_inputs(2, 70, 17, 4)

    def recomputed(*args):
        return torch.utils.checkpoint.checkpoint(conv_with(backend), *args, use_reentrant=False)

    expected = outputs_and_gradients(conv_with(backend), inputs)
    actual = outputs_and_gradients(recomputed, inputs)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", [NATIVE])
@pytest.mark.parametrize("complete", [False, True])
def test_the_operator_keeps_torchs_rules(complete, backend):
    inputs = make_inputs(2, 70, 17, 4, initial=complete, resets=complete)
    leaves = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in inputs]
    leaves[0] = leaves[0].detach().clone().requires_grad_()
    operator = getattr(torch.ops.sambay, f"causal_conv_{backend}").default
    assert set(torch.library.opcheck(operator, leaves).values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", [NATIVE])
def test_a_second_derivative_is_refused_rather_than_wrong(backend):
    inputs = make_inputs(1, 7, 5, 4)
    x = inputs[0].requires_grad_()
    (y,) = conv_with(backend)(*inputs)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(BackendUnavailable, match="second derivative; use backend='torch'"):
        gradient.sum().backward()


def test_tensors_the_native_backend_cannot_read_get_torch():
    inputs = make_inputs(2, 7, 5, 4)
    meta = [None if tensor is None else tensor.to("meta") for tensor in inputs]
    assert conv_with(None)(*meta)[0].shape == (2, 7, 5)
    with pytest.raises(BackendUnavailable, match="the tensors are on meta"):
        conv_with("native")(*meta)
    assert conv_with(None)(*in_float64(inputs))[0].dtype == torch.float64
    with pytest.raises(BackendUnavailable, match="not float64"):
        conv_with("native")(*in_float64(inputs))


@pytest.mark.parametrize("implementation", ["torch", NATIVE])
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize("width", [1, 2, 4, 5])
def test_steps_equal_the_sequence(width, dtype, state_dtype, implementation, monkeypatch):
    if implementation == "torch":
        monkeypatch.setattr(library, "serves", lambda tensor: "not now")
    x, weight, bias, initial, _ = make_inputs(3, 9, 77, width, dtype)
    state = initial.to(state_dtype)
    (expected,) = conv_with("reference")(x, weight, bias, state, None)
    inputs = torch.cat([state, x.to(state_dtype)], 1)
    outputs = [causal_conv_step(x[:, t], weight, bias, state_BCE=state) for t in range(9)]
    y = torch.stack(outputs, 1)
    assert y.dtype == dtype
    assert_alike([y], [expected], 1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert torch.equal(state, inputs[:, inputs.shape[1] - (width - 1) :])


def test_a_step_can_be_compiled():
    x, weight, bias, initial, _ = make_inputs(2, 1, 5, 4)
    torch._dynamo.reset()
    compiled = torch.compile(causal_conv_step, fullgraph=True, backend="eager")
    eager_state, compiled_state = initial.clone(), initial.clone()
    expected = causal_conv_step(x[:, 0], weight, bias, state_BCE=eager_state)
    actual = compiled(x[:, 0], weight, bias, state_BCE=compiled_state)
    assert_alike([actual, compiled_state], [expected, eager_state], 1e-6)
