"""The selective scan as an operator: compiled, checkpointed, refused; and its single step."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sambay.errors import BackendUnavailable
from sambay.ops.native import library
from sambay.ops.selective_scan import selective_scan_step
from tests.numerics.scans import make_inputs, scan_with
from tests.numerics.twins import NATIVE, assert_alike, outputs_and_gradients

FAST = ["torch", NATIVE]


@pytest.mark.parametrize("backend", FAST)
def test_it_can_be_compiled_into_one_graph(backend):
    inputs = make_inputs(2, 40, 17, 3, resets=True)
    torch._dynamo.reset()
    compiled = torch.compile(scan_with(backend), fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(scan_with(backend), inputs)
    actual = outputs_and_gradients(compiled, inputs)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", FAST)
def test_activation_checkpointing_changes_nothing(backend):
    inputs = make_inputs(2, 70, 17, 3)

    def recomputed(*args):
        return torch.utils.checkpoint.checkpoint(scan_with(backend), *args, use_reentrant=False)

    expected = outputs_and_gradients(scan_with(backend), inputs)
    actual = outputs_and_gradients(recomputed, inputs)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", ["chunked", NATIVE])
@pytest.mark.parametrize("complete", [False, True])
def test_the_operator_keeps_torchs_rules(complete, backend):
    inputs = make_inputs(2, 70, 17, 3, initial=complete, resets=complete)
    leaves = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in inputs]
    leaves[3:5] = [t.detach().clone().requires_grad_() for t in leaves[3:5] if t is not None]
    operator = getattr(torch.ops.sambay, f"selective_scan_{backend}").default
    assert set(torch.library.opcheck(operator, (*leaves, True)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_autocast_does_not_lower_its_precision(backend):
    inputs = make_inputs(2, 40, 17, 3)
    expected = outputs_and_gradients(scan_with(backend), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = outputs_and_gradients(scan_with(backend), inputs)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


class SaveFlags(TorchDispatchMode):
    """Records what the scan was asked to keep for a backward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith("sambay::selective_scan"):
            self.seen.append(args[-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", FAST)
def test_states_are_kept_only_where_a_backward_may_come(backend):
    inputs = make_inputs(2, 70, 17, 3)
    x = inputs[0]
    with SaveFlags() as flags:
        scan_with(backend)(*inputs)
        scan_with(backend)(x.clone().requires_grad_(), *inputs[1:])
        with torch.no_grad():
            scan_with(backend)(x.clone().requires_grad_(), *inputs[1:])
    assert flags.seen == [False, True, False]


@pytest.mark.parametrize("backend", FAST)
def test_a_second_derivative_is_refused_rather_than_wrong(backend):
    inputs = make_inputs(1, 4, 3, 2)
    x = inputs[0].requires_grad_()
    y, _ = scan_with(backend)(*inputs)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(BackendUnavailable, match="second derivative; use backend="):
        gradient.sum().backward()


def test_tensors_that_are_not_on_the_cpu_get_the_torch_backend():
    inputs = [None if t is None else t.to("meta") for t in make_inputs(2, 70, 17, 3)]
    y, final = scan_with(None)(*inputs)
    assert (y.shape, final.shape) == ((2, 70, 17), (2, 17, 3))
    with pytest.raises(BackendUnavailable, match="the tensors are on meta"):
        scan_with("native")(*inputs)


def test_float64_is_refused_by_the_native_backend_and_served_by_torch():
    inputs = make_inputs(1, 4, 3, 2, torch.float64)
    assert scan_with(None)(*inputs)[0].dtype == torch.float64
    with pytest.raises(BackendUnavailable, match="not float64"):
        scan_with("native")(*inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("implementation", ["torch", NATIVE])
@pytest.mark.parametrize("sizes", [(1, 5, 1), (3, 17, 3), (2, 130, 16), (8, 1100, 23)], ids=str)
def test_steps_equal_the_scan(sizes, implementation, dtype, monkeypatch):
    if implementation == "torch":
        monkeypatch.setattr(library, "serves", lambda tensor: "not now")
    rows, channels, states = sizes
    x, delta, A, B, C, D, bias, initial, _ = make_inputs(rows, 6, channels, states, dtype)
    expected, final = scan_with("reference")(x, delta, A, B, C, D, bias, initial, None)
    state = initial.clone()
    outputs = [
        selective_scan_step(
            x[:, t], delta[:, t], A, B[:, t], C[:, t], D, delta_bias_E=bias, state_BEN=state
        )
        for t in range(6)
    ]
    y = torch.stack(outputs, 1)
    assert y.dtype == dtype
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]
    assert_alike([y, state], [expected, final], tolerance)


def test_a_step_on_a_slice_of_a_state_updates_that_slice():
    x, delta, A, B, C, D, bias, initial, _ = make_inputs(2, 1, 5, 3)
    states = torch.stack([initial, initial], -1)  # not contiguous
    first = [t[:, 0] for t in (x, delta)]
    y = selective_scan_step(
        *first, A, B[:, 0], C[:, 0], D, delta_bias_E=bias, state_BEN=states[..., 0]
    )
    expected, final = scan_with("reference")(x, delta, A, B, C, D, bias, initial, None)
    assert_alike([y[:, None], states[..., 0]], [expected, final], 1e-6)
    assert torch.equal(states[..., 1], initial)


def test_a_step_can_be_compiled():
    x, delta, A, B, C, D, bias, initial, _ = make_inputs(2, 1, 5, 3)
    arguments = (x[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], D)
    torch._dynamo.reset()
    compiled = torch.compile(selective_scan_step, fullgraph=True, backend="eager")
    eager_state, compiled_state = initial.clone(), initial.clone()
    expected = selective_scan_step(*arguments, delta_bias_E=bias, state_BEN=eager_state)
    actual = compiled(*arguments, delta_bias_E=bias, state_BEN=compiled_state)
    assert_alike([actual, compiled_state], [expected, eager_state], 1e-6)
