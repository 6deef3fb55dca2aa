"""The scan of Mamba-2 as an operator (compiled, checkpointed, refused), and its CUDA kernels."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from sambay.errors import BackendUnavailable
from sambay.ops.state_space_dual import mamba_ssm
from tests.numerics.duals import make_inputs, scan_with
from tests.numerics.twins import assert_alike, outputs_and_gradients


@pytest.mark.slow
def test_it_can_be_compiled_into_one_graph():
    inputs = make_inputs(2, 70, 3, 5, 4, resets=True)
    torch._dynamo.reset()
    compiled = torch.compile(scan_with("torch"), fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(scan_with("torch"), inputs)
    actual = outputs_and_gradients(compiled, inputs)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("complete", [False, True])
def test_the_operator_keeps_torchs_rules(complete):
    inputs = make_inputs(2, 70, 3, 5, 4, initial=complete, resets=complete)
    leaves = [
        t.detach().clone().requires_grad_() if t is not None and t.is_floating_point() else t
        for t in inputs
    ]
    operator = torch.ops.sambay.state_space_dual_chunked.default
    assert set(torch.library.opcheck(operator, (*leaves, True)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_autocast_does_not_lower_its_precision(backend):
    inputs = make_inputs(2, 70, 3, 5, 4)
    expected = outputs_and_gradients(scan_with(backend), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = outputs_and_gradients(scan_with(backend), inputs)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_the_backward_keeps_the_states_between_chunks_and_nothing_else():
    inputs = make_inputs(2, 130, 3, 5, 4)
    kept: list[tuple[int, ...]] = []

    def pack(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    leaves = [t.detach().requires_grad_() if t is not None else t for t in inputs]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scan_with("torch")(*leaves)
    assert sorted(kept) == sorted([*(t.shape for t in leaves if t is not None), (4, 2, 3, 5, 4)])


def test_a_second_derivative_is_refused_rather_than_wrong():
    inputs = make_inputs(1, 4, 3, 2, 2)
    x = inputs[0].requires_grad_()
    y, _ = scan_with("torch")(*inputs)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(BackendUnavailable, match="second derivative; use backend="):
        gradient.sum().backward()


def test_tensors_that_are_not_on_the_cpu_get_the_torch_backend():
    inputs = [None if t is None else t.to("meta") for t in make_inputs(2, 1100, 3, 5, 4)]
    y, final = scan_with(None)(*inputs)
    assert (y.shape, final.shape) == ((2, 1100, 3, 5), (2, 3, 5, 4))
    with pytest.raises(BackendUnavailable, match="the tensors are on meta"):
        scan_with("mamba_ssm")(*inputs)


# What the kernels of mamba_ssm are told, by a stand-in that does what they document.


class Kernel:
    """mamba_chunk_scan_combined as a loop: documents have numbers, the initial state is 0's."""

    def __init__(self) -> None:
        self.calls: list[dict[str, object]] = []

    def __call__(
        self, x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None,
        seq_idx=None, cu_seqlens=None, dt_softplus=False, return_final_states=False,
    ):  # fmt: skip
        assert (z, cu_seqlens, dt_softplus, return_final_states) == (None, None, True, True)
        self.calls.append({
            "chunk_size": chunk_size, "groups": B.shape[2], "seq_idx": seq_idx,
            "traced": torch.compiler.is_compiling(),
        })  # fmt: skip
        resets = None
        if seq_idx is not None:
            assert (seq_idx.dtype, seq_idx.shape) == (torch.int32, dt.shape[:2])
            before = torch.nn.functional.pad(seq_idx, (1, 0))[:, :-1]
            resets = seq_idx != before
        return scan_with("reference")(
            x, dt, A, B[:, :, 0], C[:, :, 0], D, dt_bias, initial_states, resets
        )


@pytest.fixture
def kernel(monkeypatch):
    made = Kernel()
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        package = ModuleType(name)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
    module = ModuleType("mamba_ssm.ops.triton.ssd_combined")
    module.mamba_chunk_scan_combined = made  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    mamba_ssm._load.cache_clear()
    yield made
    mamba_ssm._load.cache_clear()


@pytest.mark.parametrize("first", [False, True], ids=["", "a reset before the first token"])
@pytest.mark.parametrize("resets", [False, True], ids=["one document", "resets"])
def test_the_kernels_are_called_for_the_same_result(resets, first, kernel):
    inputs = make_inputs(2, 70, 3, 5, 4, resets=resets)
    if resets:
        inputs[8][0, 0] = first
    expected = outputs_and_gradients(scan_with("reference"), inputs)
    assert_alike(outputs_and_gradients(mamba_ssm.scan, inputs), expected, 1e-6)
    (call,) = kernel.calls
    assert (call["chunk_size"], call["groups"]) == (256, 1)
    assert (call["seq_idx"] is not None) == resets


def test_traced_code_calls_the_kernels_as_they_are(kernel):
    inputs = make_inputs(2, 70, 3, 5, 4)
    expected = mamba_ssm.scan(*inputs)[0] * 2
    compiled = torch.compile(lambda *inputs: mamba_ssm.scan(*inputs)[0] * 2, backend="eager")
    assert torch.equal(compiled(*inputs), expected)
    assert [call["traced"] for call in kernel.calls] == [False, False]


def on_cuda(dtype):
    return SimpleNamespace(device=torch.device("cuda"), dtype=dtype)


def test_what_the_kernels_cannot_serve_is_said(kernel, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    why = mamba_ssm.why_unavailable
    assert why(None) is None
    assert why(on_cuda(torch.bfloat16)) is None
    assert "not float64" in why(on_cuda(torch.float64))
    assert "the tensors are on cpu" in why(torch.zeros(1))
    assert "set_float32_matmul_precision('high')" in why(on_cuda(torch.float32))
    torch.set_float32_matmul_precision("high")
    try:
        assert why(on_cuda(torch.float32)) is None
    finally:
        torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why(None) == "torch finds no CUDA device"


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("mamba_ssm", "mamba-ssm is not installed; run: pip install mamba-ssm"),
        ("triton", "mamba-ssm cannot be imported: No module named 'triton'"),
    ],
)
def test_what_is_missing_is_named(missing, reason, kernel, monkeypatch):
    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "mamba_ssm.ops.triton.ssd_combined":
                raise ModuleNotFoundError(f"No module named '{missing}'", name=missing)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delitem(sys.modules, "mamba_ssm.ops.triton.ssd_combined")
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    assert mamba_ssm.why_unavailable(None) == reason


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "mamba_ssm"])
@pytest.mark.parametrize("resets", [False, True], ids=["one document", "resets"])
def test_on_a_gpu_it_equals_the_reference(resets, backend):
    inputs = make_inputs(2, 300, 8, 64, 128, torch.bfloat16, resets=resets)
    inputs = [None if t is None else t.cuda() for t in inputs]
    if backend == "mamba_ssm" and (reason := mamba_ssm.why_unavailable(inputs[0])):
        pytest.skip(reason)
    expected = outputs_and_gradients(
        scan_with("reference"),
        [None if t is None else t.float() if t.is_floating_point() else t for t in inputs],
    )
    actual = outputs_and_gradients(scan_with(backend), inputs)
    assert_alike(actual, expected, 3e-2 if backend == "mamba_ssm" else 1e-2)
