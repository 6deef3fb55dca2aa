"""The family of the paper as functions of depth, with the published aspect ratios.

Sources: arXiv 2507.06607, section 3.1, appendix C, table 7; layer order of the released code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from sambay.errors import ConfigError, nearest
from sambay.spec.model_config import ModelConfig
from sambay.spec.parametrization import BASE_HEAD_DIM, Parametrization
from sambay.spec.recurrent import GatedMemory, RecurrentKind, RecurrentNorm, published_sizes


@dataclasses.dataclass(frozen=True)
class Preset:
    """A member of the family: its pattern as a function of depth, and what sets it apart."""

    pattern: Callable[[int], str]
    aspect_ratio: int  # hidden size per layer, published
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)


def _times(count: int, unit: str) -> str:
    return f"{count}x{unit} " if count else ""


def _yoco(self_decoder: Callable[[int], str], cross_decoder: Callable[[int], str]):
    """A self-decoder of depth/2 + 1 layers, the full-attention layer, and the cross-decoder."""
    return lambda depth: f"{self_decoder(depth)} F {cross_decoder(depth)}"


def _samba_half(depth: int) -> str:
    return f"{depth // 4}x(M S) M"


def _mamba_half(depth: int) -> str:
    return f"{depth // 2 + 1}xM"


def _window_half(depth: int) -> str:
    return f"{depth // 2 + 1}xS"


def _gated_cross(depth: int) -> str:
    return _times(depth // 4 - 1, "(G C)")


def _only_cross(depth: int) -> str:
    return _times(depth // 2 - 2, "C")


def _only_gated(depth: int) -> str:
    return _times(depth // 2 - 2, "G")


_ROPE = {"position": "rope"}
_WINDOW = {"window": 128}
# The memory is the readout before its gate and norm, so a unit that reads it norms what it gated.
_MAMBA2 = {"recurrent_kind": RecurrentKind.MAMBA2, "gated_memory": GatedMemory.NORMALISED}
_DELTA = {"recurrent_kind": RecurrentKind.GATED_DELTA, "gated_memory": GatedMemory.NORMALISED}
# Table 9: the norm goes before the gate, and plain units read what is normalised already.
_NORM_FIRST_IN_PUBLISHER = {
    "recurrent_norm": RecurrentNorm.BEFORE_GATE_IN_PUBLISHER,
    "gated_memory": GatedMemory.PLAIN,
}
_NORM_FIRST = {"recurrent_norm": RecurrentNorm.BEFORE_GATE, "gated_memory": GatedMemory.PLAIN}

PRESETS: dict[str, Preset] = {
    "transformer++": Preset(lambda depth: f"{depth}xF", 128, _ROPE),
    "transformer-ls": Preset(lambda depth: f"{depth // 4}x(S S S F)", 128, _ROPE | _WINDOW),
    "samba": Preset(lambda depth: f"{depth // 2}x(M S)", 122, _ROPE | {"window": 2048}),
    "swa+yoco": Preset(_yoco(_window_half, _only_cross), 130, _ROPE | _WINDOW),
    "samba+yoco": Preset(_yoco(_samba_half, _only_cross), 126, _WINDOW),
    "sambay": Preset(_yoco(_samba_half, _gated_cross), 124, _WINDOW),
    "sambay+da": Preset(
        _yoco(_samba_half, _gated_cross), 124, _WINDOW | {"attention_variant": "differential"}
    ),
    "mambay": Preset(_yoco(_mamba_half, _gated_cross), 120),
    "sambay-a": Preset(
        _yoco(_samba_half, _gated_cross), 126, _WINDOW | {"memory_source": "attention"}
    ),
    "sambay-aa": Preset(
        _yoco(_samba_half, _only_gated), 126, _WINDOW | {"memory_source": "attention"}
    ),
    "sambay-mlp": Preset(_yoco(_samba_half, _gated_cross), 120, _WINDOW | {"memory_source": "mlp"}),
    "sambay-2": Preset(_yoco(_samba_half, _gated_cross), 124, _WINDOW | _MAMBA2),
    "mambay-2": Preset(_yoco(_mamba_half, _gated_cross), 120, _MAMBA2),
    "gdny": Preset(_yoco(_mamba_half, _gated_cross), 120, _DELTA),
    "s-gdny": Preset(_yoco(_samba_half, _gated_cross), 126, _WINDOW | _DELTA),
    "sambay-2+nb": Preset(
        _yoco(_samba_half, _gated_cross), 124, _WINDOW | _MAMBA2 | _NORM_FIRST_IN_PUBLISHER
    ),
    "mambay-2+nb": Preset(
        _yoco(_mamba_half, _gated_cross), 120, _MAMBA2 | _NORM_FIRST_IN_PUBLISHER
    ),
    "s-gdny+gdn": Preset(_yoco(_samba_half, _gated_cross), 126, _WINDOW | _DELTA | _NORM_FIRST),
    "gdny+gdn": Preset(_yoco(_mamba_half, _gated_cross), 120, _DELTA | _NORM_FIRST),
}

NAMES = tuple(PRESETS)


def build(
    name: str,
    depth: int,
    *,
    parametrization: Parametrization | str = Parametrization.MUP_PLUS_PLUS,
    **fields: Any,
) -> ModelConfig:
    """The configuration of a family member at a depth divisible by 4.

    By default the published shape: hidden size = aspect ratio x depth, `depth` query heads of 128,
    `depth / 4` key heads, MLP of 4 x hidden size, vocabulary 32,000, tied embeddings. Any field of
    `ModelConfig` given by name replaces the published value; values that follow from a replaced one
    (MLP size, multipliers, recurrent heads) follow it.

    Raises:
        ConfigError: an unknown name or field, or a depth that is not a positive multiple of 4.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset '{name}' does not exist{nearest(name, NAMES)}")
    if depth < 4 or depth % 4:
        raise ConfigError(
            f"depth = {depth}; '{name}' repeats groups of four layers, choose 4, 8, 12, ..."
        )
    preset = PRESETS[name]
    hidden_size = fields.get("hidden_size", preset.aspect_ratio * depth)
    head_dim = fields.get("head_dim", BASE_HEAD_DIM)
    scheme = Parametrization(parametrization)
    shape: dict[str, Any] = {
        "layer_pattern": preset.pattern(depth),
        "vocab_size": 32_000,
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_heads": depth,
        "num_kv_heads": depth // 4,
        "head_dim": head_dim,
    }
    shape |= scheme.multipliers(depth, head_dim) | preset.fields
    return ModelConfig.from_dict(shape | _recurrent_sizes(shape | fields) | fields)


def _recurrent_sizes(fields: dict[str, Any]) -> dict[str, Any]:
    """The sizes of the recurrence at the given fields; those that cannot work are refused later."""
    sizes = {name: fields.get(name) for name in ("expand", "d_state", "recurrent_head_dim")}
    kind = fields.get("recurrent_kind", RecurrentKind.MAMBA)
    usable = all(value is None or (type(value) is int and value > 0) for value in sizes.values())
    if kind not in tuple(RecurrentKind) or not usable or type(fields["hidden_size"]) is not int:
        return {}
    return published_sizes(
        RecurrentKind(kind),
        fields["hidden_size"],
        expand=sizes["expand"] or 2,
        d_state=sizes["d_state"],
        head_dim=sizes["recurrent_head_dim"],
    )


def phi4_mini_flash(**fields: Any) -> ModelConfig:
    """The 3.85 B model released as Phi-4-mini-flash-reasoning (standard parametrisation)."""
    shape = build(
        "sambay+da",
        32,
        parametrization=Parametrization.STANDARD,
        vocab_size=200_064,
        hidden_size=2560,
        num_heads=40,
        num_kv_heads=20,
        head_dim=64,
        window=512,
        norm="layer",
        attention_bias=True,
    )
    return shape.replace(**fields)
