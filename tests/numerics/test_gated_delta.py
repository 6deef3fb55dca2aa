"""The gated delta rule: every backend against the loop that defines it, and what it promises."""

from __future__ import annotations

import itertools
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sambay.errors import BackendUnavailable
from sambay.ops import registry
from sambay.ops.gated_delta import fla, gated_delta, gated_delta_step, l2_normalise
from tests.numerics.scans import in_float64
from tests.numerics.twins import assert_alike, outputs_and_gradients

ALL = ["reference", "torch"]
# (rows, length, heads, keys, values): one token, two, chunk borders, odd sizes, many chunks.
SHAPES = [
    (2, 1, 3, 5, 7),
    (1, 2, 1, 4, 3),
    (2, 63, 3, 7, 5),
    (1, 64, 2, 8, 16),
    (2, 65, 3, 5, 9),
    (1, 130, 5, 3, 1),
]


def make_inputs(
    rows: int,
    length: int,
    heads: int,
    keys: int,
    values: int,
    dtype: torch.dtype = torch.float32,
    *,
    initial: bool = True,
    resets: bool = False,
) -> list[Tensor | None]:
    """Inputs as a mixer makes them: unit queries and keys, beta up to 2, values of a projection."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    projected = torch.randn(rows, length, heads, 3 + values, dtype=dtype)
    return [
        l2_normalise(torch.randn(rows, length, heads, keys, dtype=dtype)),
        l2_normalise(torch.randn(rows, length, heads, keys, dtype=dtype)),
        projected[..., 3:],
        -torch.rand(rows, length, heads, dtype=compute) * 0.4,
        torch.rand(rows, length, heads, dtype=compute) * 2,
        torch.randn(rows, heads, keys, values, dtype=compute) if initial else None,
        torch.rand(rows, length) < 0.1 if resets else None,
    ]


def rule_with(backend: str | None):
    def run(q, k, v, log_decay, beta, initial_state, resets):
        return gated_delta(
            q,
            k,
            v,
            log_decay,
            beta,
            scale=0.7,
            initial_state_BHKV=initial_state,
            resets_BT=resets,
            backend=backend,
        )

    return run


@pytest.mark.parametrize("resets", [False, True], ids=["one document", "resets"])
@pytest.mark.parametrize("initial", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference_in_values_and_gradients(shape, initial, resets):
    inputs = make_inputs(*shape, initial=initial, resets=resets)
    expected = outputs_and_gradients(rule_with("reference"), in_float64(inputs))
    assert_alike(outputs_and_gradients(rule_with("torch"), inputs), expected, 1e-5)
    actual = outputs_and_gradients(rule_with("torch"), in_float64(inputs))
    assert_alike(actual, expected, 1e-13)


def test_a_state_that_is_reflected_at_every_token_stays_accurate_for_long():
    """beta = 2 without decay, keys alike: the hardest case for an inverse within a chunk."""
    q, k, v, log_decay, beta, initial, _ = make_inputs(1, 300, 2, 6, 4)
    k = l2_normalise(k[:, :1] + 0.1 * k)
    log_decay.zero_()
    beta.fill_(2.0)
    inputs = [q, k, v, log_decay, beta, initial, None]
    expected = outputs_and_gradients(rule_with("reference"), in_float64(inputs))
    loop = outputs_and_gradients(rule_with("reference"), inputs)
    chunked = outputs_and_gradients(rule_with("torch"), inputs)
    assert_alike(loop, expected, 2e-5)
    assert_alike(chunked, expected, 2e-5)
    exact = outputs_and_gradients(rule_with("torch"), in_float64(inputs))
    assert_alike(exact, expected, 1e-12)


@pytest.mark.parametrize("backend", ALL)
def test_gradients_are_those_of_finite_differences(backend):
    inputs = make_inputs(1, 5, 2, 2, 3, torch.float64)
    inputs[6] = torch.tensor([[False, False, False, True, False]])
    leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in inputs]
    assert torch.autograd.gradcheck(rule_with(backend), leaves, fast_mode=True)


def test_bfloat16_stays_close_to_float32():
    inputs = make_inputs(2, 100, 3, 8, 16, torch.bfloat16, resets=True)
    wide = [t.float() if t.is_floating_point() else t for t in inputs]
    expected = outputs_and_gradients(rule_with("reference"), wide)
    actual = outputs_and_gradients(rule_with("torch"), inputs)
    half, full = torch.bfloat16, torch.float32
    assert [t.dtype for t in actual] == [half, full, half, half, half, full, full, full]
    assert_alike(actual, expected, 1e-2)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("border", [1, 64, 77, 99])
def test_a_sequence_may_be_computed_in_two_parts(border, backend):
    inputs = make_inputs(2, 100, 3, 5, 7, resets=True)
    initial, resets = inputs[5:]
    o, final = rule_with(backend)(*inputs)

    def part(tokens: slice, state: Tensor | None):
        return rule_with(backend)(*(t[:, tokens] for t in inputs[:5]), state, resets[:, tokens])

    o1, middle = part(slice(0, border), initial)
    o2, end = part(slice(border, None), middle)
    assert_alike([torch.cat([o1, o2], 1), end], [o, final], 2e-6)


@pytest.mark.parametrize("backend", ALL)
def test_a_reset_separates_documents_in_values_and_gradients(backend):
    lengths = [1, 27, 42, 20]
    inputs = make_inputs(1, sum(lengths), 2, 5, 3)
    starts = torch.zeros(1, sum(lengths), dtype=torch.bool)
    starts[0, [0, 1, 28, 70]] = True

    def packed(*args):
        return rule_with(backend)(*args[:6], starts)

    def separate(*args):
        parts = zip(*(t.split(lengths, 1) for t in args[:5]), strict=True)
        results = [rule_with(backend)(*part, None, None) for part in parts]
        return torch.cat([o for o, _ in results], 1), results[-1][1] + 0 * args[5]

    actual, expected = (outputs_and_gradients(run, inputs) for run in (packed, separate))
    assert_alike(actual, expected, 2e-6)
    assert not actual[-1].any(), "a reset before the first token drops the initial state"


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_leaves_the_state_bitwise_unchanged(dtype, backend):
    inputs = make_inputs(2, 70, 3, 5, 7, dtype)
    inputs[3].zero_()
    inputs[4].zero_()
    _, final = rule_with(backend)(*inputs)
    assert torch.equal(final, inputs[5])


@pytest.mark.parametrize("backend", ALL)
def test_padding_before_a_row_changes_nothing(backend):
    inputs = make_inputs(1, 60, 2, 5, 7, initial=False)
    o, final = rule_with(backend)(*inputs)
    padded = [torch.cat([torch.randn_like(t[:, :7]), t], 1) for t in inputs[:3]]
    padded += [torch.cat([torch.zeros_like(t[:, :7]), t], 1) for t in inputs[3:5]]
    o_padded, final_padded = rule_with(backend)(*padded, None, None)
    assert_alike([o_padded[:, 7:], final_padded], [o, final], 2e-6)


def test_extreme_decays_stay_finite_and_right():
    inputs = make_inputs(2, 140, 2, 8, 5)
    log_decay = inputs[3]
    log_decay[0, ::3] = -1e4
    log_decay[0, 1::3] = -1e-7
    log_decay[1] = -80.0
    log_decay[1, :, 1] = 0.0
    expected = outputs_and_gradients(rule_with("reference"), in_float64(inputs))
    actual = outputs_and_gradients(rule_with("torch"), inputs)
    assert all(torch.isfinite(tensor).all() for tensor in actual)
    assert_alike(actual, expected, 1e-5)


@pytest.mark.parametrize("backend", ALL)
def test_earlier_outputs_and_other_rows_do_not_depend_on_later_tokens(backend):
    inputs = make_inputs(2, 90, 2, 5, 3)
    o, _ = rule_with(backend)(*inputs)
    for tensor in inputs[:5]:
        tensor[0, 77:] += 0.25
    o_changed, _ = rule_with(backend)(*inputs)
    assert torch.equal(o_changed[0, :77], o[0, :77])
    assert torch.equal(o_changed[1], o[1])
    assert not torch.equal(o_changed[0, 77:], o[0, 77:])


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("which", range(6))
def test_nan_is_not_hidden(which, backend):
    inputs = make_inputs(2, 40, 2, 5, 3)
    inputs[which][(0,) * inputs[which].ndim] = float("nan")
    o, final = rule_with(backend)(*inputs)
    assert o[0].isnan().any()
    assert not o[1].isnan().any(), "rows are independent"
    assert not final[1].isnan().any()


@pytest.mark.parametrize("used", [0, 1], ids=["o", "final state"])
def test_one_output_may_go_unused(used):
    def only(backend):
        return lambda *inputs: (rule_with(backend)(*inputs)[used],)

    inputs = make_inputs(2, 70, 2, 5, 3)
    expected = outputs_and_gradients(only("reference"), in_float64(inputs))
    assert_alike(outputs_and_gradients(only("torch"), inputs), expected, 1e-5)


def test_any_strides_are_read_correctly():
    q, k, v, log_decay, beta, initial, _ = make_inputs(2, 70, 3, 5, 7)
    odd = [
        q.transpose(1, 2).contiguous().transpose(1, 2),
        k[:, :, :1].expand(-1, -1, 3, -1),
        v.flip(1).flip(1).repeat(1, 1, 1, 2)[..., ::2],
        log_decay[:1].expand(2, -1, -1),
        beta.transpose(0, 2).contiguous().transpose(0, 2),
        initial.transpose(0, 3).contiguous().transpose(0, 3),
        (torch.rand(70) < 0.1).expand(2, 70),
    ]
    expected = outputs_and_gradients(rule_with("reference"), in_float64(odd))
    assert_alike(outputs_and_gradients(rule_with("torch"), odd), expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_steps_equal_the_sequence(dtype):
    q, k, v, log_decay, beta, initial, _ = make_inputs(3, 9, 2, 5, 7, dtype)
    inputs = (q, k, v, log_decay, beta)
    expected, final = rule_with("reference")(*inputs, initial, None)
    states = torch.stack([initial, initial], -1)  # a slice of a larger buffer: not contiguous
    outputs = [
        gated_delta_step(*(x[:, t] for x in inputs), scale=0.7, state_BHKV=states[..., 0])
        for t in range(9)
    ]
    o = torch.stack(outputs, 1)
    assert o.dtype == dtype
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float64: 1e-13}[dtype]
    assert_alike([o, states[..., 0]], [expected, final], tolerance)
    assert torch.equal(states[..., 1], initial)


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("initial", [False, True])
def test_shapes_and_dtypes_are_known_without_running_it(initial, resets):
    inputs = make_inputs(2, 35, 3, 5, 7, torch.bfloat16, initial=initial, resets=resets)
    real = outputs_and_gradients(rule_with("torch"), inputs)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [None if t is None else mode.from_tensor(t) for t in inputs]
        leaves = [
            t.requires_grad_() if t is not None and t.is_floating_point() else t for t in fakes
        ]
        fake = rule_with("torch")(*leaves)
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        fake += torch.autograd.grad([o.sum() for o in fake], wanted)
    described = [[(t.shape, t.dtype) for t in tensors] for tensors in (fake, real)]
    assert described[0] == described[1]


@pytest.mark.slow
def test_it_can_be_compiled_into_one_graph():
    inputs = make_inputs(2, 7, 3, 5, 7, resets=True)
    torch._dynamo.reset()
    compiled = torch.compile(rule_with("torch"), fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(rule_with("torch"), inputs)
    actual = outputs_and_gradients(compiled, inputs)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("complete", [False, True])
def test_the_operator_keeps_torchs_rules(complete):
    inputs = make_inputs(1, 3, 2, 3, 2, initial=complete, resets=complete)
    leaves = [None if t is None else t.detach().clone() for t in inputs]
    leaves = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in leaves]
    operator = torch.ops.sambay.gated_delta_chunked.default
    assert set(torch.library.opcheck(operator, (*leaves, 0.7, True)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", ALL)
def test_autocast_does_not_lower_its_precision(backend):
    inputs = make_inputs(2, 70, 2, 5, 3)
    expected = outputs_and_gradients(rule_with(backend), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = outputs_and_gradients(rule_with(backend), inputs)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_a_second_derivative_is_refused_rather_than_wrong():
    inputs = make_inputs(1, 4, 1, 3, 2)
    k = inputs[1].requires_grad_()
    o, _ = rule_with("torch")(*inputs)
    (gradient,) = torch.autograd.grad(o.square().sum(), k, create_graph=True)
    with pytest.raises(BackendUnavailable, match="second derivative"):
        gradient.sum().backward()


def test_normalised_vectors_have_unit_length_and_zero_stays_zero():
    x = torch.randn(4, 5, dtype=torch.bfloat16)
    x[0] = 0
    x.requires_grad_()
    unit = l2_normalise(x)
    assert unit.dtype == torch.bfloat16
    torch.testing.assert_close(
        unit.detach().float().norm(dim=-1)[1:], torch.ones(3), atol=1e-2, rtol=0
    )
    assert not unit[0].any()
    unit.sum().backward()
    assert torch.isfinite(x.grad).all()


class _Kernels:
    """Stands in for flash-linear-attention: records each call, and computes it by the loop."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def chunk_gated_delta_rule(self, **arguments: Any) -> tuple[Tensor, Tensor]:
        self.calls.append(arguments)
        q, k, v, g, beta = (arguments[name] for name in ("q", "k", "v", "g", "beta"))
        borders, states = arguments.get("cu_seqlens"), arguments["initial_state"]
        assert arguments["output_final_state"]
        rule = rule_with("reference")
        if borders is None:
            return rule(q, k, v, g, beta, states, None)
        assert q.shape[0] == 1, "the kernels take documents in one row only"
        parts = []
        for i, (start, end) in enumerate(itertools.pairwise(borders)):
            pieces = (x[:, start:end] for x in (q, k, v, g, beta))
            parts.append(rule(*pieces, None if states is None else states[i : i + 1], None))
        return torch.cat([o for o, _ in parts], 1), torch.cat([final for _, final in parts])


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch):
    fake = _Kernels()
    module = types.ModuleType("fla.ops.gated_delta_rule")
    module.chunk_gated_delta_rule = fake.chunk_gated_delta_rule
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", module)
    fla._load.cache_clear()
    yield fake
    fla._load.cache_clear()


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("resets", [False, True])
def test_the_fla_backend_hands_documents_over_as_one_row(resets, initial, kernels):
    inputs = make_inputs(3, 20, 2, 4, 3, initial=initial, resets=resets)
    if resets:
        inputs[6][:, 0] = torch.tensor([True, False, False])

    def run(*args):
        return fla.scan(*args, 0.7)

    expected = outputs_and_gradients(rule_with("reference"), inputs)
    assert_alike(outputs_and_gradients(run, inputs), expected, 1e-6)
    (call,) = kernels.calls
    assert call["scale"] == 0.7
    assert ("cu_seqlens" in call) == resets
    if resets:
        starts = inputs[6].clone()
        starts[:, 0] = True
        borders = [*starts.flatten().nonzero().flatten().tolist(), 60]
        assert call["cu_seqlens"].dtype == torch.int64
        assert call["cu_seqlens"].tolist() == borders


def test_the_fla_backend_says_why_it_cannot_serve(monkeypatch, kernels):
    def reason(**tensor: Any) -> str | None:
        return fla.why_unavailable(types.SimpleNamespace(**tensor))

    half, cuda = torch.bfloat16, torch.device("cuda")
    assert "the tensors are on cpu" in fla.why_unavailable(torch.ones(1, 1, 1, 4))
    assert "not float32" in reason(device=cuda, dtype=torch.float32, shape=(1, 1, 1, 4))
    assert "at most 256" in reason(device=cuda, dtype=half, shape=(1, 1, 1, 300))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason(device=cuda, dtype=half, shape=(1, 1, 1, 4)) == "torch finds no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert reason(device=cuda, dtype=half, shape=(1, 1, 1, 4)) is None
    monkeypatch.setitem(sys.modules, "fla", None)
    monkeypatch.delitem(sys.modules, "fla.ops")
    monkeypatch.delitem(sys.modules, "fla.ops.gated_delta_rule")
    fla._load.cache_clear()
    assert "pip install flash-linear-attention" in fla.why_unavailable(None)
    with pytest.raises(BackendUnavailable, match="the tensors are on cpu"):
        rule_with("fla")(*make_inputs(1, 3, 1, 2, 2))
    rows = {row.backend: row for row in registry.table() if row.op == "gated_delta"}
    assert rows["torch"].available
    assert "flash-linear-attention" in rows["fla"].reason


@pytest.mark.gpu
def test_the_fla_backend_equals_the_reference_on_a_gpu():
    if (reason := fla.why_unavailable(None)) is not None:
        pytest.skip(reason)
    inputs = make_inputs(2, 200, 3, 64, 128, torch.bfloat16, resets=True)
    wide = [t.float() if t.is_floating_point() else t for t in inputs]
    expected = outputs_and_gradients(rule_with("reference"), wide)

    def on_gpu(*args):
        return tuple(x.cpu() for x in rule_with("fla")(*(x.cuda() for x in args)))

    assert_alike(outputs_and_gradients(on_gpu, inputs), expected, 3e-2)
