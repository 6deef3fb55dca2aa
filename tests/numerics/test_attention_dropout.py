"""Dropout of attention probabilities: every route against the definition with the same mask."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sambay.layers.attention import CrossAttention, SelfAttention, set_attention_dropout
from sambay.model import LanguageModel
from sambay.ops.attention import AttentionCall, attention, reference_attention
from sambay.ops.differential import differential_attention
from tests.tiny import tiny_config

DROPOUT = 0.3


def inputs(B: int, H: int, K: int, T: int, S: int, P: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(B, H, T, P), (B, K, S, P), (B, K, S, P)]
    options = {"dtype": torch.float64, "generator": generator}
    return [torch.randn(shape, **options).requires_grad_() for shape in shapes]


def kept(q: Tensor, k: Tensor, seed: int, **call: Any) -> Tensor:
    """The mask of a call with this seed: with the unit matrix as values it returns its map."""
    B, K, S, _ = k.shape
    torch.manual_seed(seed)
    return attention(q, k, torch.eye(S).to(k).expand(B, K, S, S), **call) != 0


def reference(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, **call: Any) -> Tensor:
    names = ("window", "starts_B", "segments_BT")
    rest = [call.get(name) for name in names]
    return reference_attention(AttentionCall(q, k, v, call["scale"], *rest, DROPOUT), keep)


def assert_same(fast: Tensor, slow: Tensor, tensors: list[Tensor]) -> None:
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(slow)
    torch.testing.assert_close(
        torch.autograd.grad(fast, tensors, weights),
        torch.autograd.grad(slow, tensors, weights),
        rtol=1e-8,
        atol=1e-8,
    )


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 6), (7, 7), (33, 38), (300, 300)])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("visible", ["all", "padded", "packed"])
def test_routes_equal_the_definition(T: int, S: int, window: int | None, visible: str) -> None:
    tensors = inputs(2, 6, 3, T, S)
    call: dict[str, Any] = {"scale": 0.3, "window": window, "dropout": DROPOUT}
    if visible == "padded":
        call["starts_B"] = torch.tensor([0, min(3, S - 1)])
    if visible == "packed":
        if T != S:
            return
        call["segments_BT"] = torch.arange(2 * T).view(2, T).div(5, rounding_mode="floor").int()
    keep = kept(*tensors[:2], 5, **call)
    assert T * S < 20 or window == 1 or 0 < keep.sum() < keep.numel()
    torch.manual_seed(5)
    fast = attention(*tensors, **call)
    assert_same(fast, reference(*tensors, keep, **call), tensors)


@pytest.mark.parametrize(("H", "K", "T", "S"), [(4, 2, 9, 9), (8, 4, 70, 70), (4, 4, 1, 8)])
@pytest.mark.parametrize("window", [None, 4])
def test_differential_maps_drop_before_the_subtraction(
    H: int, K: int, T: int, S: int, window: int | None
) -> None:
    """Both halves of a head's value meet the same mask; the two maps have masks of their own."""
    tensors = inputs(2, H, K, T, S)
    weight = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    call: dict[str, Any] = {"scale": 0.4, "window": window, "dropout": DROPOUT}
    q, k, v = tensors
    group = H // K
    # The order of the heads within the one call that is made: pair, map, member of the group.
    order = [
        2 * (pair * group + member) + which
        for pair in range(K // 2)
        for which in range(2)
        for member in range(group)
    ]
    keep = torch.empty(2, H, T, S, dtype=torch.bool)
    keep[:, order] = kept(q[:, order], k, 6, **call)
    assert T == 1 or not torch.equal(keep[:, 0], keep[:, 1])
    torch.manual_seed(6)
    fast = differential_attention(*tensors, weight, **call)
    heads = []
    for j in range(H // 2):
        pair = j // group
        value = torch.cat((v[:, 2 * pair], v[:, 2 * pair + 1]), dim=-1)[:, None]
        first, second = (
            reference(
                q[:, 2 * j + s, None],
                k[:, 2 * pair + s, None],
                value,
                keep[:, 2 * j + s, None],
                **call,
            )
            for s in range(2)
        )
        heads.append(first - weight * second)
    assert_same(fast, torch.cat(heads, dim=1), [*tensors, weight])


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("window", [None, 40])
def test_how_many_are_kept_and_what_they_weigh(backend: str, window: int | None) -> None:
    """With equal scores a kept probability is exactly 1 / visible / (1 - dropout)."""
    T, dropout = 200, 0.05
    q = k = torch.zeros(2, 4, T, 2, dtype=torch.float64)
    eye = torch.eye(T, dtype=torch.float64).expand(2, 4, T, T)
    torch.manual_seed(8)
    maps = attention(q, k, eye, scale=1.0, window=window, dropout=dropout, backend=backend)
    column = torch.arange(T)
    seen = (column <= column[:, None]) & (column > column[:, None] - (window or T))
    count = seen.sum(1).to(maps).view(T, 1)
    assert not maps[..., ~seen].any()
    weights = (maps * count)[..., seen]
    assert set(weights.unique().round(decimals=9).tolist()) == {0.0, round(1 / (1 - dropout), 9)}
    share, tolerance = (weights == 0).double().mean(), math.sqrt(dropout / weights.numel())
    assert share == pytest.approx(dropout, abs=4 * tolerance)
    assert weights.mean() == pytest.approx(1, abs=5 * tolerance)
    # No row, column or head is spared.
    assert (maps[:, :, 20:] == 0).double()[..., seen[20:]].view(8, -1).mean(1).min() > dropout / 2
    assert not torch.equal(maps[0, 0], maps[0, 1])
    assert not torch.equal(maps[0, 0], maps[1, 0])


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_the_seed_decides(backend: str) -> None:
    q, k, v = (x.detach() for x in inputs(1, 2, 2, 40, 40))

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return attention(q, k, v, scale=0.3, window=9, dropout=DROPOUT, backend=backend)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("T", [1, 40])
def test_zero_is_the_plain_route_and_draws_nothing(window: int | None, T: int) -> None:
    q, k, v = (x.detach() for x in inputs(2, 4, 2, T, 40))
    weight = torch.tensor(0.5, dtype=torch.float64)
    before = torch.get_rng_state()
    plain = attention(q, k, v, scale=0.3, window=window)
    assert torch.equal(plain, attention(q, k, v, scale=0.3, window=window, dropout=0.0))
    plain = differential_attention(q, k, v, weight, scale=0.3, window=window)
    zero = differential_attention(q, k, v, weight, scale=0.3, window=window, dropout=0.0)
    assert torch.equal(plain, zero)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", ["sambay", "sambay+da"])
def test_a_model_drops_where_and_when_it_is_told(name: str) -> None:
    model = LanguageModel(tiny_config(name))
    ids = torch.arange(60).view(2, 30)
    plain = model(ids)
    set_attention_dropout(model, self_decoder=0.4, cross_decoder=0.2)
    shares = {type(m): m.maps.dropout for m in model.modules() if isinstance(m, CrossAttention)}
    assert shares == {SelfAttention: 0.4, CrossAttention: 0.2}
    noisy = model(ids)
    assert not torch.allclose(noisy, plain)
    assert not torch.allclose(noisy, model(ids))
    model.eval()
    assert torch.equal(model(ids), plain)
    model.train()
    for shares in (
        {"self_decoder": 0.0, "cross_decoder": 0.2},
        {"self_decoder": 0.4, "cross_decoder": 0.0},
    ):
        set_attention_dropout(model, **shares)
        assert not torch.allclose(model(ids), plain)
    set_attention_dropout(model, self_decoder=0.0, cross_decoder=0.0)
    assert torch.equal(model(ids), plain)
    assert "dropout" not in " ".join(model.state_dict())
