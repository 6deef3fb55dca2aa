"""Cached = uncached, for every family member, padding, chunk size and step."""

from __future__ import annotations

import functools
import itertools
import random

import pytest
import torch
from torch import Tensor

from sambay.errors import ConfigError
from sambay.model import LanguageModel, ModelCache
from tests.tiny import FAMILY, allocate, random_ids, tiny_model

assert_close = functools.partial(torch.testing.assert_close, rtol=1e-7, atol=1e-9)


def uncached_rows(model: LanguageModel, ids: Tensor, starts: Tensor) -> list[Tensor]:
    """The logits of each row alone, without its padding."""
    return [model(row[None, start:])[0] for row, start in zip(ids, starts.tolist(), strict=True)]


def cut(length: int, rng: random.Random) -> list[int]:
    """Random chunk borders from 0 to `length`, some chunks of a single column."""
    borders = [0]
    while borders[-1] < length:
        borders.append(min(length, borders[-1] + rng.choice([1, 1, 2, 3, 5, 8, 13])))
    return borders


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("seed", [0, 1, 2])
@torch.no_grad()
def test_chunks_and_steps_equal_the_plain_forward(name: str, seed: int) -> None:
    rng = random.Random(f"{name}{seed}")
    model = tiny_model(name)
    length = 31  # the window of 5 is crossed several times
    ids = random_ids(3, length, seed)
    starts = torch.tensor([0, rng.randrange(1, 12), rng.randrange(1, 12)])
    cache = allocate(model, 3, length, starts)
    borders = cut(length, rng)
    parts = [model(ids[:, a:b], cache=cache) for a, b in itertools.pairwise(borders)]
    cached = torch.cat(parts, dim=1)
    padded = model(ids, starts=starts)
    for row, (start, alone) in enumerate(
        zip(starts.tolist(), uncached_rows(model, ids, starts), strict=True)
    ):
        assert_close(cached[row, start:], alone)
        assert_close(padded[row, start:], alone)
    assert torch.isfinite(cached).all()
    assert cache.length == length


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("length", [1, 2, 5, 6, 29])
@torch.no_grad()
def test_last_column_only_equals_the_full_forward(name: str, length: int) -> None:
    model = tiny_model(name)
    ids = random_ids(2, length)
    last = model(ids, outputs="last")
    assert last.shape[1] == 1
    assert_close(last, model(ids)[:, -1:])


@pytest.mark.parametrize("name", FAMILY)
@torch.no_grad()
def test_fast_prefill_then_decode_equals_the_plain_forward(name: str) -> None:
    """Chunks that only advance the state, then the last column, then single steps."""
    model = tiny_model(name)
    ids, starts = random_ids(3, 30), torch.tensor([0, 4, 9])
    cache = allocate(model, 3, 30, starts)
    for a, b in ((0, 3), (3, 4), (4, 12)):
        assert model(ids[:, a:b], cache=cache, outputs="none").shape == (3, 0, 61)
    parts = [model(ids[:, 12:20], cache=cache, outputs="last")]
    parts += [model(ids[:, t : t + 1], cache=cache) for t in range(20, 30)]
    out = torch.cat(parts, dim=1)
    for row, alone in enumerate(uncached_rows(model, ids, starts)):
        assert_close(out[row], alone[-11:])


@pytest.mark.parametrize("name", ["sambay", "sambay+da", "transformer-ls"])
@torch.no_grad()
def test_float32_on_the_fast_backends(name: str) -> None:
    """As above in float32, where the compiled scan and convolution serve."""
    model = tiny_model(name, dtype=torch.float32)
    ids, starts = random_ids(4, 40), torch.tensor([0, 7, 2, 16])
    cache = allocate(model, 4, 40, starts)
    parts = [model(ids[:, :17], cache=cache), model(ids[:, 17:20], cache=cache)]
    parts += [model(ids[:, t : t + 1], cache=cache) for t in range(20, 40)]
    out = torch.cat(parts, dim=1)
    for row, (start, alone) in enumerate(
        zip(starts.tolist(), uncached_rows(model, ids, starts), strict=True)
    ):
        torch.testing.assert_close(out[row, start:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sambay", "transformer++"])
@pytest.mark.parametrize("order", [[2, 0], [0, 2], [1, 2]])
@torch.no_grad()
def test_rows_can_leave(name: str, order: list[int]) -> None:
    model = tiny_model(name)
    ids, starts = random_ids(3, 20), torch.tensor([3, 0, 6])
    cache = allocate(model, 3, 20, starts)
    model(ids[:, :12], cache=cache)
    keep = torch.tensor(order)
    before = cache.nbytes
    cache.select_rows(keep)
    assert cache.nbytes * 3 == before * 2
    out = torch.cat([model(ids[keep, t : t + 1], cache=cache) for t in range(12, 20)], dim=1)
    rows = uncached_rows(model, ids, starts)
    for place, row in enumerate(keep.tolist()):
        assert_close(out[place], rows[row][-8:])


@torch.no_grad()
def test_leaving_rows_close_up_without_a_copy() -> None:
    model = tiny_model("sambay")
    cache = allocate(model, 4, 8)
    places = [{n: x.data_ptr() for n, x in s.buffers.items()} for s in cache.layers if s]
    cache.select_rows(torch.tensor([1, 3]))
    assert places == [{n: x.data_ptr() for n, x in s.buffers.items()} for s in cache.layers if s]


@pytest.mark.parametrize("name", ["sambay", "samba", "transformer-ls"])
@pytest.mark.parametrize("capacity", [3, 6])
@torch.no_grad()
def test_a_cache_can_grow_and_never_forgets_silently(name: str, capacity: int) -> None:
    """Also where it was first shorter than the window."""
    model = tiny_model(name, window=8)
    ids = random_ids(2, 20)
    cache = allocate(model, 2, capacity)
    first = model(ids[:, :capacity], cache=cache)
    with pytest.raises(ConfigError, match=f"capacity of {capacity}"):
        model(ids[:, capacity : capacity + 1], cache=cache)
    cache = allocate(model, 2, capacity)
    model(ids[:, :capacity], cache=cache)
    cache.reserve(20)
    rest = model(ids[:, capacity:], cache=cache)
    assert_close(torch.cat((first, rest), dim=1), model(ids))


@torch.no_grad()
def test_the_recurrent_state_is_float32_under_bfloat16() -> None:
    model = tiny_model("sambay", dtype=torch.bfloat16)
    cache = ModelCache.allocate(model.config, 2, 9, torch.bfloat16, "cpu")
    logits = model(random_ids(2, 8), cache=cache)
    model(random_ids(2, 1), cache=cache)
    assert logits.dtype is torch.bfloat16
    mamba = cache.layers[0]
    assert mamba is not None
    assert {x.dtype for x in mamba.buffers.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"outputs": "lst"}, "did you mean 'last'"),
        ({"segments": torch.zeros(1, 4, dtype=torch.int32), "outputs": "last"}, "segments"),
    ],
)
def test_impossible_arguments(arguments: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_model("sambay")(random_ids(1, 4), **arguments)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one column"):
        tiny_model("sambay")(random_ids(1, 0))
