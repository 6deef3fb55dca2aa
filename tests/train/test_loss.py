"""The chunked loss against its definition in float64: three sums and both gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sambay.train import loss
from sambay.train.loss import IGNORE, cross_entropy, cross_entropy_reference

# No option; smoothing; z-loss; both.
OPTIONS = [{}, {"smoothing": 0.1}, {"z_loss": 1e-2}, {"smoothing": 0.3, "z_loss": 1e-3}]


def _inputs(shape: tuple[int, ...], vocab: int, width: int, dtype: torch.dtype) -> tuple:
    generator = torch.Generator().manual_seed(3)
    h = torch.randn(*shape, width, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(vocab, shape, generator=generator)
    return h.requires_grad_(), weight.requires_grad_(), labels


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk", [1, 3, 35, 1000, None])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_equals_the_definition(options: dict, chunk: int | None, ignored: str) -> None:
    h, weight, labels = _inputs((5, 7), 11, 6, torch.float64)
    if ignored == "some":
        labels[1, 2:] = IGNORE
        labels[4, 6] = IGNORE
    if ignored == "all":
        labels[:] = IGNORE
    expected = cross_entropy_reference(h, weight, labels, **options)
    actual = cross_entropy(h, weight, labels, chunk=chunk, **options)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert [value.requires_grad for value in actual] == [True, False, False]
    for mine, theirs in zip(
        torch.autograd.grad(0.37 * actual.objective, (h, weight)),
        torch.autograd.grad(0.37 * expected.objective, (h, weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_definition_written_out_for_one_token(options: dict) -> None:
    h, weight, _ = _inputs((1,), 9, 4, torch.float64)
    logits = [
        sum(a * b for a, b in zip(h[0].tolist(), row, strict=True)) for row in weight.tolist()
    ]
    lse = math.log(sum(math.exp(logit) for logit in logits))
    smoothing, z_loss = options.get("smoothing", 0.0), options.get("z_loss", 0.0)
    wanted = (1 - smoothing) * (lse - logits[2]) + smoothing * (lse - sum(logits) / 9)
    losses = cross_entropy(h, weight, torch.tensor([2]), **options)
    assert losses.objective.item() == pytest.approx(wanted + z_loss * lse**2, rel=1e-12)
    assert losses.nats.item() == pytest.approx(lse - logits[2], rel=1e-12)
    assert losses.z.item() == pytest.approx(lse**2, rel=1e-12)


def test_without_options_the_objective_is_the_cross_entropy() -> None:
    h, weight, labels = _inputs((20,), 13, 4, torch.float32)
    plain, smooth = (cross_entropy(h, weight, labels, smoothing=value) for value in (0.0, 0.1))
    assert plain.objective.item() == plain.nats.item() == smooth.nats.item()
    assert smooth.objective.item() != smooth.nats.item()


def test_large_logits_and_an_exact_value() -> None:
    h = torch.tensor([[1000.0, 0.0]])
    weight = torch.eye(2)
    assert cross_entropy(h, weight, torch.tensor([0])).nats.item() == 0.0
    assert cross_entropy(h, weight, torch.tensor([1])).nats.item() == 1000.0
    uniform = cross_entropy(torch.zeros(3, 2), torch.ones(8, 2), torch.tensor([0, 3, 7]))
    assert uniform.nats.item() == pytest.approx(3 * 2.0794415, rel=1e-6)


def test_a_tied_weight_gathers_both_gradients() -> None:
    _, weight, labels = _inputs((12,), 10, 6, torch.float64)
    ids = torch.arange(12) % 10
    gradients = []
    for function in (cross_entropy, cross_entropy_reference):
        losses = function(F.embedding(ids, weight).tanh(), weight, labels, smoothing=0.1)
        gradients.append(torch.autograd.grad(losses.objective, weight)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bf16_hidden_states(
    weight_dtype: torch.dtype, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "_PRODUCT_VALUES", 32 * 7)  # the vocabulary in slices of 7
    h, weight, labels = _inputs((40,), 50, 32, torch.float32)
    weight = (weight / 4).to(weight_dtype).detach().requires_grad_()
    h16 = h.detach().bfloat16().requires_grad_()
    actual = cross_entropy(h16, weight, labels, chunk=7, **options)
    rounded, exact = h16.detach().double().requires_grad_(), weight.detach().double()
    exact.requires_grad_()
    expected = cross_entropy_reference(rounded, exact, labels, **options)
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), theirs, rtol=5e-3, atol=0)
    dh, dweight = torch.autograd.grad(actual.objective / 3, (h16, weight))
    wanted = torch.autograd.grad(expected.objective / 3, (rounded, exact))
    assert (dh.dtype, dweight.dtype) == (torch.bfloat16, weight_dtype)
    for mine, theirs in zip((dh, dweight), wanted, strict=True):
        assert (mine.double() - theirs).norm() < 0.02 * theirs.norm()


def test_the_weight_gradient_is_summed_in_fp32() -> None:
    """2,000 equal tokens one by one: a bf16 sum would stop growing at 256 times its first term."""
    h = torch.ones(2000, 2, dtype=torch.bfloat16)
    weight = torch.zeros(4, 2, requires_grad=True)
    objective = cross_entropy(h, weight, torch.zeros(2000, dtype=torch.int64), chunk=1).objective
    (dweight,) = torch.autograd.grad(objective, weight)
    torch.testing.assert_close(dweight[:, 0], torch.tensor([-1500.0, 500.0, 500.0, 500.0]))


def test_logits_never_exist_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, vocab, largest = 130, 300, 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    h, weight, labels = _inputs((tokens,), vocab, 4, torch.float32)
    with Watch():
        cross_entropy(h, weight, labels, chunk=32, smoothing=0.1).objective.backward()
    assert largest == 32 * vocab * 4


def test_without_gradients_nothing_is_prepared_for_backward() -> None:
    h, weight, labels = _inputs((9,), 12, 4, torch.float32)
    with torch.no_grad():
        value = cross_entropy(h, weight, labels, chunk=4)
    assert not value.objective.requires_grad
    torch.testing.assert_close(value.nats, cross_entropy(h, weight, labels).nats)


@pytest.mark.parametrize("frozen", ["h", "weight"])
def test_a_frozen_input_gets_no_gradient_and_the_other_the_same(frozen: str) -> None:
    h, weight, labels = _inputs((9,), 12, 4, torch.float64)
    both = torch.autograd.grad(cross_entropy(h, weight, labels).objective, (h, weight))
    (h if frozen == "h" else weight).requires_grad_(False)
    cross_entropy(h, weight, labels).objective.backward()
    assert (h.grad is None, weight.grad is None) == (frozen == "h", frozen == "weight")
    if frozen == "h":
        assert torch.equal(weight.grad, both[1])
    else:
        assert torch.equal(h.grad, both[0])


def test_backward_twice_is_refused() -> None:
    h, weight, labels = _inputs((9,), 12, 4, torch.float32)
    objective = cross_entropy(h, weight, labels).objective
    objective.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="works once"):
        objective.backward()


@pytest.mark.parametrize("label", [-1, 12])
def test_a_label_outside_the_vocabulary_is_an_error(label: int) -> None:
    h, weight, labels = _inputs((9,), 12, 4, torch.float32)
    labels[3] = label
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        cross_entropy(h, weight, labels)


def test_inside_a_compiled_function() -> None:
    h, weight, labels = _inputs((9,), 12, 4, torch.float64)

    def objective(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return cross_entropy(h * 2, weight, labels, chunk=4, smoothing=0.1).objective / 9

    compiled = torch.compile(objective, backend="aot_eager")
    torch.testing.assert_close(compiled(h, weight), objective(h, weight))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(h, weight), (h, weight)),
        torch.autograd.grad(objective(h, weight), (h, weight)),
    )
