"""The chunked cross-entropy against the plain one, in value and both gradients."""

from __future__ import annotations

import pytest
import torch

from sambay.train.loss import IGNORE, cross_entropy, cross_entropy_reference


def _inputs(shape: tuple[int, ...], vocab: int, width: int, dtype: torch.dtype) -> tuple:
    generator = torch.Generator().manual_seed(3)
    h = torch.randn(*shape, width, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(vocab, shape, generator=generator)
    return h.requires_grad_(), weight.requires_grad_(), labels


@pytest.mark.parametrize("chunk", [1, 3, 5, 35, 1000, None])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_equals_the_plain_version(chunk: int | None, ignored: str) -> None:
    h, weight, labels = _inputs((5, 7), 11, 6, torch.float64)
    if ignored == "some":
        labels[1, 2:] = IGNORE
        labels[4, 6] = IGNORE
    if ignored == "all":
        labels[:] = IGNORE
    expected = cross_entropy_reference(h, weight, labels)
    actual = cross_entropy(h, weight, labels, chunk=chunk)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(
        torch.autograd.grad(0.37 * actual, (h, weight)),
        torch.autograd.grad(0.37 * expected.double(), (h, weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_large_logits_and_an_exact_value() -> None:
    h = torch.tensor([[1000.0, 0.0]])
    weight = torch.eye(2)
    assert cross_entropy(h, weight, torch.tensor([0])).item() == 0.0
    assert cross_entropy(h, weight, torch.tensor([1])).item() == 1000.0
    uniform = cross_entropy(torch.zeros(3, 2), torch.ones(8, 2), torch.tensor([0, 3, 7]))
    assert uniform.item() == pytest.approx(3 * 2.0794415, rel=1e-6)


def test_bf16_hidden_states_with_float32_weights() -> None:
    h, weight, labels = _inputs((40,), 50, 32, torch.float32)
    h16 = h.detach().bfloat16().requires_grad_()
    actual = cross_entropy(h16, weight, labels, chunk=7)
    rounded = h16.detach().float().requires_grad_()
    expected = cross_entropy_reference(rounded, weight, labels)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=5e-3, atol=0)
    dh, dweight = torch.autograd.grad(actual, (h16, weight))
    dh_wanted, dweight_wanted = torch.autograd.grad(expected, (rounded, weight))
    assert (dh.dtype, dweight.dtype) == (torch.bfloat16, torch.float32)
    assert (dh.float() - dh_wanted).norm() < 0.02 * dh_wanted.norm()
    assert (dweight - dweight_wanted).norm() < 0.02 * dweight_wanted.norm()


def test_logits_never_exist_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    plain = torch.Tensor.log_softmax

    def recorded(self: torch.Tensor, dim: int) -> torch.Tensor:
        rows.append(self.shape[0])
        return plain(self, dim)

    monkeypatch.setattr(torch.Tensor, "log_softmax", recorded)
    h, weight, labels = _inputs((10, 13), 30, 4, torch.float32)
    cross_entropy(h, weight, labels, chunk=32).backward()
    assert rows == [32, 32, 32, 32, 2]


def test_without_gradients_nothing_is_prepared_for_backward() -> None:
    h, weight, labels = _inputs((9,), 12, 4, torch.float32)
    with torch.no_grad():
        value = cross_entropy(h, weight, labels, chunk=4)
    assert not value.requires_grad
    torch.testing.assert_close(value, cross_entropy(h, weight, labels).detach())
