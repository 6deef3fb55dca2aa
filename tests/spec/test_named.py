"""Models by name have their published or stated sizes, and small ones are equally large."""

from __future__ import annotations

import pytest

from sambay.errors import ConfigError
from sambay.spec import LayerKind
from sambay.spec.footprint import cache_bytes, parameter_count
from sambay.spec.named import NAMED, named


def millions(name: str, *, embeddings: bool = True) -> float:
    return parameter_count(named(name), embeddings=embeddings) / 1e6


def test_phi4_mini_has_its_published_size_and_cache() -> None:
    assert millions("phi4-mini", embeddings=False) == pytest.approx(3221.2, abs=0.3)
    assert millions("phi4-mini") == pytest.approx(3835.8, abs=0.3)
    assert cache_bytes(named("phi4-mini"), 1, 1, kv_bytes=2) == 131_072


def test_models_of_flash_size_differ_from_it_in_what_they_say() -> None:
    flash = named("phi4-mini-flash")
    assert named("sambay-3.8b").replace(attention_variant="differential") == flash
    assert named("samba+yoco-3.8b").layer_pattern == "8x(M S) M F 14xC"
    for name in ("sambay-3.8b", "samba+yoco-3.8b", "samba+yoco+da-3.8b"):
        config = named(name)
        assert config.window == 512
        assert cache_bytes(config, 1, 2000, kv_bytes=2) == cache_bytes(flash, 1, 2000, kv_bytes=2)


@pytest.mark.parametrize(("size", "parameters"), [("20m", 20.6), ("120m", 121.2)])
def test_small_models_are_equally_large(size: str, parameters: float) -> None:
    names = [name for name in NAMED if name.endswith(f"-{size}")]
    assert len(names) == 4
    for name in names:
        assert millions(name) == pytest.approx(parameters, rel=0.01)
        config = named(name)
        assert config.num_heads == 4 * config.num_kv_heads
    readers = {
        name: sum(
            layer.kind in (LayerKind.FULL, LayerKind.CROSS) for layer in named(name).layers
        ) / named(name).num_layers
        for name in (f"sambay-{size}", f"samba+yoco-{size}", f"transformer++-{size}")
    }  # fmt: skip
    assert readers[f"sambay-{size}"] == 1 / 4
    assert readers[f"transformer++-{size}"] == 1


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'phi4-mini-flash'"):
        named("phi4-mini-flush")
    assert all(named(name).num_layers > 0 for name in NAMED)
