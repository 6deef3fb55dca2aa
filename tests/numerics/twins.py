"""Comparing a fast implementation with its slow twin: values and the gradient of every input."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from sambay.ops.native import library

_reason = library.why_unavailable()
NATIVE = pytest.param("native", marks=pytest.mark.skipif(_reason is not None, reason=str(_reason)))


def outputs_and_gradients(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor | None]
) -> list[Tensor]:
    """The outputs, then the gradients of all floating inputs, for the same random output gradients.

    The inputs are used as they are (strides included), through views that require gradients.
    """
    leaves = [
        tensor.detach().requires_grad_()
        if tensor is not None and tensor.is_floating_point()
        else tensor
        for tensor in inputs
    ]
    outputs = function(*leaves)
    generator = torch.Generator().manual_seed(7)
    loss = sum(
        (
            output.double() * torch.randn(output.shape, generator=generator, dtype=torch.float64)
        ).sum()
        for output in outputs
    )
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    assert isinstance(loss, Tensor)
    gradients = torch.autograd.grad(loss, wanted, materialize_grads=True)
    return [*(output.detach() for output in outputs), *gradients]


def assert_alike(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Every pair differs by at most `tolerance` times the largest expected element."""
    assert len(actual) == len(expected)
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape, (index, a.shape, e.shape)
        if not e.numel():
            continue
        scale = e.double().abs().max().clamp_min(1e-30)
        error = ((a.double() - e.double()).abs().max() / scale).item()
        assert error <= tolerance, f"result {index} of shape {tuple(e.shape)} is off by {error:.2e}"
