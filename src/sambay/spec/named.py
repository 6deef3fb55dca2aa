"""Whole models by one name: those whose speed the paper compares, and small ones like them.

Sources: arXiv 2507.06607, table 7 and section 4; the models of 3.8 B have the dimensions of
Phi-4-mini-flash. The small ones keep their proportions: one full attention in four layers of
SambaY that read the growing cache, four query heads per key head, windows, an MLP of four times the
hidden size. Of one size the parameters, embeddings included, are equal within 1 %.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sambay.errors import ConfigError, nearest
from sambay.spec import presets
from sambay.spec.model_config import ModelConfig
from sambay.spec.parametrization import Parametrization

_SMALL_VOCABULARY = 4096
_20M: dict[str, Any] = {
    "vocab_size": _SMALL_VOCABULARY, "num_heads": 8, "num_kv_heads": 2, "head_dim": 48,
}  # fmt: skip
_120M: dict[str, Any] = {"vocab_size": _SMALL_VOCABULARY}


def phi4_mini() -> ModelConfig:
    """The dense Transformer of 3.84 B parameters that Phi-4-mini-flash is compared with.

    32 layers of attention with 24 query and 8 key heads of 128, all of them growing caches. Its
    rotary positions turn whole heads here, which costs the same.
    """
    return presets.build(
        "transformer++",
        32,
        parametrization=Parametrization.STANDARD,
        vocab_size=200_064,
        hidden_size=3072,
        intermediate_size=8192,
        num_heads=24,
        num_kv_heads=8,
    )


def _flash_sized(name: str) -> ModelConfig:
    """A member of the family with the dimensions of Phi-4-mini-flash."""
    flash = presets.phi4_mini_flash()
    fields = (
        "vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim",
        "window", "norm", "attention_bias",
    )  # fmt: skip
    return presets.build(
        name,
        32,
        parametrization=Parametrization.STANDARD,
        **{field: getattr(flash, field) for field in fields},
    )


def _small(name: str, hidden_size: int, shape: dict[str, Any]) -> Callable[[], ModelConfig]:
    return lambda: presets.build(name, 8, hidden_size=hidden_size, **shape)


NAMED: dict[str, Callable[[], ModelConfig]] = {
    "phi4-mini": phi4_mini,
    "phi4-mini-flash": presets.phi4_mini_flash,
    "sambay-3.8b": lambda: _flash_sized("sambay"),
    "samba+yoco-3.8b": lambda: _flash_sized("samba+yoco"),
    "samba+yoco+da-3.8b": lambda: _flash_sized("samba+yoco").replace(
        attention_variant="differential"
    ),
    "transformer++-1b": lambda: presets.build("transformer++", 16),
    "sambay-1b": lambda: presets.build("sambay", 16),
    "samba+yoco-1b": lambda: presets.build("samba+yoco", 16),
    "transformer++-120m": _small("transformer++", 1004, _120M),
    "sambay-120m": _small("sambay", 952, _120M),
    "sambay+da-120m": _small("sambay+da", 952, _120M),
    "samba+yoco-120m": _small("samba+yoco", 960, _120M),
    "transformer++-20m": _small("transformer++", 406, _20M),
    "sambay-20m": _small("sambay", 384, _20M),
    "sambay+da-20m": _small("sambay+da", 384, _20M),
    "samba+yoco-20m": _small("samba+yoco", 388, _20M),
}


def named(name: str) -> ModelConfig:
    """The configuration of that name.

    Raises:
        ConfigError: there is none (suggests the nearest).
    """
    if name not in NAMED:
        raise ConfigError(f"model '{name}' does not exist{nearest(name, NAMED)}")
    return NAMED[name]()
