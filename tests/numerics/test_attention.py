"""The fast routes of attention against the dense definition, in values and every gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from sambay.errors import BackendUnavailable, ConfigError
from sambay.ops.attention import attention


def inputs(B: int, H: int, K: int, T: int, S: int, P: int = 6, dtype=torch.float64) -> list[Tensor]:
    shapes = [(B, H, T, P), (B, K, S, P), (B, K, S, P)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def assert_equals_definition(tensors: list[Tensor], rtol: float = 1e-9, **call: Any) -> None:
    fast = attention(*tensors, scale=0.3, **call)
    slow = attention(*tensors, scale=0.3, backend="reference", **call)
    weights = torch.randn_like(slow)
    fast_grads = torch.autograd.grad(fast, tensors, weights)
    slow_grads = torch.autograd.grad(slow, tensors, weights)
    torch.testing.assert_close(fast, slow, rtol=rtol, atol=rtol)
    for fast_grad, slow_grad in zip(fast_grads, slow_grads, strict=True):
        torch.testing.assert_close(fast_grad, slow_grad, rtol=10 * rtol, atol=10 * rtol)


CASES = list(itertools.product((1, 2, 7, 33, 100, 300), (0, 5), (None, 1, 5, 64, 100)))


@pytest.mark.parametrize(("T", "cached", "window"), CASES)
@pytest.mark.parametrize("padded", [False, True])
def test_routes_equal_the_definition(T: int, cached: int, window: int | None, padded: bool) -> None:
    S = T + cached
    starts = torch.tensor([0, min(3, S - 1)]) if padded else None
    assert_equals_definition(inputs(2, 6, 3, T, S), window=window, starts_B=starts)


@pytest.mark.parametrize("T", [2, 33, 300])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_segments_equal_the_definition(T: int, window: int | None) -> None:
    segments = torch.randint(0, 4, (2, T)).sort(dim=1).values.int()
    assert_equals_definition(inputs(2, 4, 2, T, T), window=window, segments_BT=segments)


@pytest.mark.parametrize(("H", "K"), [(1, 1), (6, 6), (6, 1), (8, 2)])
def test_head_groups(H: int, K: int) -> None:
    assert_equals_definition(inputs(1, H, K, 9, 9), window=4)


@pytest.mark.parametrize("window", [None, 7])
def test_bfloat16_stays_near_the_float32_definition(window: int | None) -> None:
    q, k, v = (x.detach().bfloat16() for x in inputs(2, 4, 2, 65, 65, 16, torch.float32))
    out = attention(q, k, v, scale=0.25, window=window)
    exact = attention(
        q.float(), k.float(), v.float(), scale=0.25, window=window, backend="reference"
    )
    assert out.dtype is torch.bfloat16
    error = (out.float() - exact).norm() / exact.norm()
    assert error < 1e-2


@pytest.mark.parametrize("T", [40, 1])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_the_window_ends_exactly(T: int, backend: str) -> None:
    """Column i - window changes nothing at i; column i - window + 1 does."""
    window, S, i = 7, 40, 39
    q, k, v = (x.detach() for x in inputs(1, 2, 1, T, S))

    def last(column: int) -> Tensor:
        moved_k, moved_v = k.clone(), v.clone()
        moved_k[:, :, column] += 1.0
        moved_v[:, :, column] += 1.0
        return attention(q, moved_k, moved_v, scale=1.0, window=window, backend=backend)[:, :, -1]

    before = attention(q, k, v, scale=1.0, window=window, backend=backend)[:, :, -1]
    assert torch.equal(last(i - window), before)
    assert not torch.allclose(last(i - window + 1), before)


@pytest.mark.parametrize("window", [None, 5])
def test_the_future_is_invisible(window: int | None) -> None:
    q, k, v = (x.detach() for x in inputs(1, 2, 2, 50, 50))
    out = attention(q, k, v, scale=1.0, window=window)
    k[:, :, 30:] = 1e3
    v[:, :, 30:] = -1e3
    again = attention(q, k, v, scale=1.0, window=window)
    assert torch.equal(out[:, :, :30], again[:, :, :30])
    assert not torch.equal(out[:, :, 30:], again[:, :, 30:])


def test_padding_is_invisible_and_finite() -> None:
    q, k, v = (x.detach() for x in inputs(2, 2, 2, 20, 20))
    starts = torch.tensor([0, 8])
    out = attention(q, k, v, scale=1.0, starts_B=starts)
    alone = attention(q[1:, :, 8:], k[1:, :, 8:], v[1:, :, 8:], scale=1.0)
    torch.testing.assert_close(out[1:, :, 8:], alone)
    assert torch.isfinite(out).all()


def test_no_query_gives_no_row() -> None:
    q, k, v = (x.detach() for x in inputs(2, 4, 2, 3, 9))
    assert attention(q[:, :, :0], k, v, scale=1.0).shape == (2, 4, 0, 6)


def test_a_long_window_needs_no_square_mask() -> None:
    """T = 8,192 with a dense float mask and map would need half a gigabyte per head."""
    q, k, v = (torch.randn(1, 1, 8192, 4) for _ in range(3))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple) else (out,):
                if isinstance(x, Tensor):
                    largest = max(largest, x.untyped_storage().nbytes())
            return out

    with Watch():
        attention(q, k, v, scale=0.5, window=128)
    assert 0 < largest < 8192 * 128 * 8


def test_segments_cannot_continue_a_cache() -> None:
    q, k, v = inputs(1, 1, 1, 3, 4)
    with pytest.raises(ConfigError, match="segments"):
        attention(q, k, v, scale=1.0, segments_BT=torch.zeros(1, 3, dtype=torch.int32))


def test_an_unknown_backend_is_refused() -> None:
    q, k, v = inputs(1, 1, 1, 3, 3)
    with pytest.raises(BackendUnavailable, match="did you mean 'sdpa'"):
        attention(q, k, v, scale=1.0, backend="spda")
