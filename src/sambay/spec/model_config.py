"""The complete description of a model: a frozen dataclass that goes to and from JSON."""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
from collections.abc import Mapping
from typing import Any

from sambay.errors import ConfigError, nearest
from sambay.spec.layers import LayerSpec, MemorySource, resolve_layers
from sambay.spec.pattern import format_pattern, parse_pattern
from sambay.spec.recurrent import GatedMemory, RecurrentKind, RecurrentNorm


class AttentionVariant(enum.StrEnum):
    """How attention maps are formed."""

    SOFTMAX = "softmax"
    DIFFERENTIAL = "differential"  # the difference of two maps, in every S, F and C layer


class Position(enum.StrEnum):
    """How positions enter attention."""

    NONE = "none"
    ROPE = "rope"  # full head dimension, half-split rotation, in every attention layer


class Norm(enum.StrEnum):
    """The normalisation before each mixer and MLP, and before the head."""

    RMS = "rms"
    LAYER = "layer"  # with bias


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a model is. Everything that changes a number is here and is stored with its weights.

    Multipliers are plain numbers: the model multiplies and does not know which scaling rule they
    came from.

    `d_state` is the state per channel of Mamba, per head of Mamba-2, and the size of the keys of
    Gated DeltaNet. `recurrent_heads` and `recurrent_head_dim` belong to the latter two; together
    they are the width of what is read from the state. `expand` and `dt_rank` belong to Mamba.

    Raises:
        ConfigError: a field that cannot work, naming the field and the remedy.
    """

    layer_pattern: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    attention_scale: float
    window: int | None = None
    attention_variant: AttentionVariant = AttentionVariant.SOFTMAX
    attention_bias: bool = False
    position: Position = Position.NONE
    rope_theta: float = 10_000.0
    memory_source: MemorySource = MemorySource.MAMBA
    gated_memory: GatedMemory = GatedMemory.PLAIN
    recurrent_kind: RecurrentKind = RecurrentKind.MAMBA
    recurrent_norm: RecurrentNorm = RecurrentNorm.AFTER_GATE
    recurrent_heads: int = 0
    recurrent_head_dim: int = 0
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int = 0
    norm: Norm = Norm.RMS
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)
        put("layer_pattern", format_pattern(parse_pattern(self.layer_pattern)))
        for name, kind in _ENUMS.items():
            put(name, _member(name, kind, getattr(self, name)))
        if self.dt_rank == 0 and type(self.hidden_size) is int:
            put("dt_rank", math.ceil(self.hidden_size / 16))
        self._check_numbers()
        self._check_attention()
        self._check_recurrence()
        _ = self.layers  # resolves sources, so an impossible pattern fails here

    @functools.cached_property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The typed layers, with every reader bound to its source."""
        return resolve_layers(
            self.layer_pattern, window=self.window, memory_source=self.memory_source
        )

    @property
    def num_layers(self) -> int:
        """The number of blocks (depth)."""
        return len(self.layers)

    @property
    def d_inner(self) -> int:
        """The width of what the recurrent mixer reads from its state."""
        if self.recurrent_kind is RecurrentKind.MAMBA:
            return self.expand * self.hidden_size
        return self.recurrent_heads * self.recurrent_head_dim

    @property
    def attention_size(self) -> int:
        """The width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def memory_size(self) -> int:
        """The width of the memory that gated memory units read."""
        return {
            MemorySource.MAMBA: self.d_inner,
            MemorySource.ATTENTION: self.attention_size,
            MemorySource.MLP: self.intermediate_size,
        }[self.memory_source]

    def replace(self, **fields: Any) -> ModelConfig:
        """A copy with some fields changed.

        Multipliers are stored numbers, so a change that leaves one stale is refused: give the new
        value along with it.
        """
        unknown = fields.keys() - _FIELDS.keys()
        if unknown:
            name = min(unknown)
            raise ConfigError(f"model.{name}: no such field{nearest(name, _FIELDS)}")
        if fields.get("hidden_size", self.hidden_size) != self.hidden_size:
            fields.setdefault("dt_rank", 0)
        new = dataclasses.replace(self, **fields)
        if new.head_dim != self.head_dim and "attention_scale" not in fields:
            raise ConfigError(
                f"model.head_dim: attention_scale = {self.attention_scale:g} was computed for "
                f"head_dim {self.head_dim}; give attention_scale as well"
            )
        if new.num_layers != self.num_layers:
            for name in ("residual_multiplier", "logit_multiplier"):
                if name not in fields and getattr(self, name) != 1.0:
                    raise ConfigError(
                        f"model.layer_pattern: {name} = {getattr(self, name):g} was computed for "
                        f"{self.num_layers} layers; give {name} as well"
                    )
        return new

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with `num_layers` added as a cross-check for readers.

        What only some models have is left out of the others, whose files older readers know.
        """
        fields = {
            name: value.value if isinstance(value, enum.Enum) else value
            for name, value in ((name, getattr(self, name)) for name in _FIELDS)
            if name not in _LEFT_OUT_AT_DEFAULT or value != _FIELDS[name].default
        }
        return {
            "layer_pattern": fields.pop("layer_pattern"),
            "num_layers": self.num_layers,
        } | fields

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The configuration stored by `to_dict`.

        Raises:
            ConfigError: an unknown or missing field, or a `num_layers` unlike the pattern.
        """
        fields = dict(values)
        num_layers = fields.pop("num_layers", None)
        for name in fields:
            if name not in _FIELDS:
                raise ConfigError(f"model.{name}: no such field{nearest(name, _FIELDS)}")
        for name, field in _FIELDS.items():
            if name not in fields and field.default is dataclasses.MISSING:
                raise ConfigError(f"model.{name}: missing; every model configuration needs it")
        config = cls(**fields)
        if num_layers is not None and num_layers != config.num_layers:
            raise ConfigError(
                f"model.layer_pattern has {config.num_layers} layers, num_layers says "
                f"{num_layers}; correct one of them"
            )
        return config

    def first_difference(self, other: ModelConfig) -> tuple[str, Any, Any] | None:
        """The first field in which two configurations differ, with both values; None if equal."""
        for name in _FIELDS:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return name, mine, theirs
        return None

    def _check_numbers(self) -> None:
        for name, field in _FIELDS.items():
            value = getattr(self, name)
            least = 0 if name in _ONLY_WITH_HEADS else 1
            if field.type == "int" and (type(value) is not int or value < least):
                raise ConfigError(
                    f"model.{name} = {value!r}; it must be a whole number of {least} or more"
                )
            if field.type == "float":
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise ConfigError(f"model.{name} = {value!r}; it must be a number")
                if not math.isfinite(value) or value <= 0:
                    raise ConfigError(f"model.{name} = {value!r}; it must be finite and above 0")
                object.__setattr__(self, name, float(value))
            if field.type == "bool" and type(value) is not bool:
                raise ConfigError(f"model.{name} = {value!r}; it must be true or false")
        if self.window is not None and (type(self.window) is not int or self.window < 1):
            raise ConfigError(
                f"model.window = {self.window!r}; it counts the visible positions including the "
                "current one, so it must be 1 or more"
            )

    def _check_attention(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_kv_heads = {self.num_kv_heads} does not divide num_heads = "
                f"{self.num_heads}; query heads share key heads in equal groups"
            )
        if self.attention_variant is AttentionVariant.DIFFERENTIAL:
            for name in ("num_heads", "num_kv_heads"):
                if getattr(self, name) % 2:
                    raise ConfigError(
                        f"model.{name} = {getattr(self, name)} is odd; differential attention "
                        "pairs heads, choose an even number"
                    )
        if self.position is Position.ROPE and self.head_dim % 2:
            raise ConfigError(
                f"model.head_dim = {self.head_dim} is odd; rotary positions rotate pairs, "
                "choose an even number"
            )

    def _check_recurrence(self) -> None:
        kind = self.recurrent_kind
        for name in _ONLY_WITH_HEADS:
            value = getattr(self, name)
            if kind is RecurrentKind.MAMBA and value:
                raise ConfigError(
                    f"model.{name} = {value}, but recurrent_kind is 'mamba', which has no heads; "
                    "leave it out or choose 'mamba2' or 'gated_delta'"
                )
            if kind is not RecurrentKind.MAMBA and not value:
                raise ConfigError(
                    f"model.{name}: missing; recurrent_kind = '{kind}' needs 1 or more"
                )
        if kind is RecurrentKind.MAMBA and self.recurrent_norm is not RecurrentNorm.AFTER_GATE:
            raise ConfigError(
                f"model.recurrent_norm = '{self.recurrent_norm}', but recurrent_kind is 'mamba', "
                "which has no norm; leave it out or choose 'mamba2' or 'gated_delta'"
            )


_FIELDS = {field.name: field for field in dataclasses.fields(ModelConfig)}
_ENUMS: dict[str, type[enum.StrEnum]] = {
    "attention_variant": AttentionVariant,
    "position": Position,
    "memory_source": MemorySource,
    "gated_memory": GatedMemory,
    "recurrent_kind": RecurrentKind,
    "recurrent_norm": RecurrentNorm,
    "norm": Norm,
}
_ONLY_WITH_HEADS = ("recurrent_heads", "recurrent_head_dim")
_LEFT_OUT_AT_DEFAULT = ("gated_memory", "recurrent_kind", "recurrent_norm", *_ONLY_WITH_HEADS)


def _member(name: str, kind: type[enum.StrEnum], value: Any) -> enum.StrEnum:
    try:
        return kind(value)
    except ValueError:
        hint = nearest(str(value), [member.value for member in kind])
        raise ConfigError(f"model.{name} = {value!r} is not a known value{hint}") from None
