"""Differential attention against a definition written head by head."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sambay.layers.attention import DifferentialMaps
from sambay.ops.attention import attention
from sambay.ops.differential import differential_attention, lambda_init
from tests.tiny import tiny_config


def by_head(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, **call) -> Tensor:
    """Head j pairs query heads (2j, 2j + 1) with key heads (2p, 2p + 1), p = j // group."""
    group = q.shape[1] // k.shape[1]
    heads = []
    for j in range(q.shape[1] // 2):
        p = j // group
        value = torch.cat((v[:, 2 * p], v[:, 2 * p + 1]), dim=-1)[:, None]
        maps = [
            attention(
                q[:, 2 * j + s, None], k[:, 2 * p + s, None], value, backend="reference", **call
            )
            for s in range(2)
        ]
        heads.append(maps[0] - weight * maps[1])
    return torch.cat(heads, dim=1)


@pytest.mark.parametrize(("H", "K"), [(2, 2), (8, 2), (8, 4), (12, 4)])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 9), (9, 9), (6, 11), (70, 70)])
@pytest.mark.parametrize("window", [None, 4])
def test_equals_the_definition(H: int, K: int, T: int, S: int, window: int | None) -> None:
    tensors = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, H, T, 6), (2, K, S, 6), (2, K, S, 6), ())
    ]
    starts = torch.tensor([0, S // 3]) if S > T else None
    call = {"scale": 0.4, "window": window, "starts_B": starts}
    fast, slow = differential_attention(*tensors, **call), by_head(*tensors, **call)
    weights = torch.randn_like(slow)
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)
    fast_grads = torch.autograd.grad(fast, tensors, weights)
    slow_grads = torch.autograd.grad(slow, tensors, weights)
    for fast_grad, slow_grad in zip(fast_grads, slow_grads, strict=True):
        torch.testing.assert_close(fast_grad, slow_grad, rtol=1e-8, atol=1e-8)


def test_packed_rows() -> None:
    q, k, v = (torch.randn(1, n, 12, 6, dtype=torch.float64) for n in (4, 2, 2))
    segments = torch.tensor([[0] * 5 + [1] * 7], dtype=torch.int32)
    weight = torch.tensor(0.7, dtype=torch.float64)
    packed = differential_attention(q, k, v, weight, scale=0.4, segments_BT=segments)
    for part in (slice(0, 5), slice(5, 12)):
        alone = differential_attention(
            q[:, :, part], k[:, :, part], v[:, :, part], weight, scale=0.4
        )
        torch.testing.assert_close(packed[:, :, part], alone)


@pytest.mark.parametrize(
    ("layer", "value"), [(1, 0.3555), (3, 0.5561), (17, 0.7963), (31, 0.79995)]
)
def test_the_published_schedule(layer: int, value: float) -> None:
    assert lambda_init(layer) == pytest.approx(value, abs=6e-5)


def test_the_layer_follows_the_paper() -> None:
    """(1 - lambda_init) RMSNorm(O1 - lambda O2), halves of a pair as neighbouring heads."""
    config = tiny_config("sambay+da")
    maps = DifferentialMaps(config, config.layers[3])
    with torch.no_grad():
        for parameter in maps.parameters():
            parameter.normal_(0.5, 0.3)
    maps.double()
    q, k, v = (torch.randn(2, n, 9, 6, dtype=torch.float64) for n in (8, 4, 4))
    lam = (
        math.exp((maps.lambda_q1 @ maps.lambda_k1).item())
        - math.exp((maps.lambda_q2 @ maps.lambda_k2).item())
        + lambda_init(3)
    )
    assert maps.weight().item() == pytest.approx(lam)
    difference = by_head(q, k, v, torch.tensor(lam), scale=config.attention_scale, window=5)
    normed = F.rms_norm(difference, (12,), maps.norm_weight, config.norm_eps)
    expected = ((1 - lambda_init(3)) * normed).transpose(1, 2).reshape(2, 9, 48)
    torch.testing.assert_close(maps(q, k, v, None, None), expected)


def test_without_subtraction_it_is_ordinary_attention() -> None:
    q, k, v = (torch.randn(1, n, 7, 6, dtype=torch.float64) for n in (4, 2, 2))
    zero = torch.zeros((), dtype=torch.float64)
    out = differential_attention(q, k, v, zero, scale=0.4)
    for j in range(2):
        for half in range(2):
            plain = attention(q[:, 2 * j, None], k[:, :1], v[:, half, None], scale=0.4)
            torch.testing.assert_close(out[:, j, :, 6 * half : 6 * half + 6], plain[:, 0])
