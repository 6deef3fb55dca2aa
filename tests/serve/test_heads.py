"""The layout of heads for vLLM: differential attention in plain heads, shares of processes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sambay.errors import ConfigError
from sambay.ops.differential import differential_attention
from sambay.serve.heads import plan_heads
from sambay.spec import presets
from tests.tiny import tiny_config

CPU_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of (T, heads, size), as any engine with grouped heads computes it."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("thp,shp->hts", q, k) * scale
    mask = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool).tril()
    maps = torch.softmax(scores.masked_fill(~mask, float("-inf")), -1)
    return torch.einsum("hts,shp->thp", maps, v)


@pytest.mark.parametrize(
    ("heads", "keys", "sizes"), [(8, 4, CPU_SIZES), (4, 4, None), (12, 2, None)]
)
def test_differential_attention_is_grouped_attention_over_pairs(heads, keys, sizes) -> None:
    config = tiny_config("sambay+da", num_heads=heads, num_kv_heads=keys)
    plan, T, P = plan_heads(config, 1, sizes), 9, config.head_dim
    q, k, v = (torch.randn(T, n * P, dtype=torch.float64) for n in (heads, keys, keys))
    weight = torch.tensor(0.3, dtype=torch.float64)
    expected = differential_attention(
        *(x.view(1, T, -1, P).transpose(1, 2) for x in (q, k, v)), weight, scale=0.4
    )
    out = grouped_attention(
        plan.widen_queries(q).view(T, plan.queries, plan.size),
        plan.widen_keys(k).view(T, plan.keys, plan.size),
        plan.widen_keys(v).view(T, plan.keys, plan.size),
        0.4,
    )
    first, second = plan.narrow(out.flatten(1)).unflatten(1, (-1, 2)).unbind(2)
    torch.testing.assert_close((first - weight * second).transpose(0, 1), expected[0])


def test_pairs_need_no_more_cache_than_heads() -> None:
    config = presets.phi4_mini_flash()
    plan = plan_heads(config, 1, None)
    assert (plan.queries, plan.keys, plan.size) == (40, 10, 128)
    assert plan.keys * plan.size == config.num_kv_heads * config.head_dim


@pytest.mark.parametrize(
    ("processes", "keys", "copies"), [(1, 10, 1), (2, 5, 1), (5, 2, 1), (10, 1, 1), (20, 1, 2)]
)
def test_the_released_model_on_several_processes(processes: int, keys: int, copies: int) -> None:
    plan = plan_heads(presets.phi4_mini_flash(), processes, None)
    assert (plan.keys, plan.key_copies, plan.queries * processes) == (keys, copies, 40)


def test_keys_that_do_not_divide_are_copied_to_where_they_are_read() -> None:
    config = presets.phi4_mini_flash()
    processes, group = 4, 2
    plan = plan_heads(config, processes, None)  # 20 query pairs, 10 key pairs
    assert (plan.keys, plan.key_copies) == (5, 2)
    rows = torch.arange(2 * config.num_kv_heads * config.head_dim)[:, None]
    keys, values = plan.copy_keys(rows).chunk(2)
    assert torch.equal(values - keys, torch.full_like(keys, len(rows) // 2))
    unit = keys.view(processes, plan.keys, -1)[..., 0] // plan.unit_size
    for rank in range(processes):
        for query in range(plan.query_units // processes):
            whole = rank * (plan.query_units // processes) + query
            mine = query // (plan.query_units // processes // plan.keys)
            assert unit[rank, mine] == whole // group


def test_processes_that_cannot_share_the_queries_are_refused_with_those_that_can() -> None:
    with pytest.raises(ConfigError, match=r"8 does not divide the 20 pairs .* one of 1, 2, 4, 5"):
        plan_heads(presets.phi4_mini_flash(), 8, None)


def test_heads_are_padded_to_a_size_the_machine_has() -> None:
    config = tiny_config("samba", num_heads=4, num_kv_heads=4)  # heads of 6
    assert plan_heads(config, 1, CPU_SIZES).size == 32
    assert plan_heads(config, 1, None).size == 8
    with pytest.raises(ConfigError, match=r"heads of 600.* at most 512"):
        plan_heads(tiny_config("samba", head_dim=600, attention_scale=0.1), 1, CPU_SIZES)
