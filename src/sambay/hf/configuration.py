"""The configurations of transformers for this package's models: `sambay` and `phi4flash`.

Both know how to become a `ModelConfig`, from which the one model class is built.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

from sambay.errors import ConfigError, MissingPackage
from sambay.hf import official
from sambay.model.folder import layer_types, refuse_misspelt
from sambay.spec import LayerSpec, ModelConfig, presets

try:
    from transformers import PreTrainedConfig
except ModuleNotFoundError as error:
    raise MissingPackage("transformers", "the classes of transformers", "hf") from error

_DEFAULTS = presets.build("sambay", 16)
_MODEL_FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig))
_DERIVED = ("num_hidden_layers", "num_layers", "layer_types")


class DecoderConfig(PreTrainedConfig, abc.ABC):
    """What both configurations offer to the model and to the caches of transformers."""

    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]

    @abc.abstractmethod
    def model_config(self) -> ModelConfig:
        """The architecture.

        Raises:
            ConfigError: fields that cannot work together.
        """

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The typed layers, with every reader bound to its source."""
        return self.model_config().layers

    @property
    def layer_types(self) -> list[str]:
        """What transformers calls the layers."""
        return layer_types(self.model_config())

    @property
    def kv_sharing_modes(self) -> list[str | None]:
        """Which layers own a cache layer; the others read what a layer before them has computed."""
        return [None if layer.kind.keeps_state else "reuse" for layer in self.layers]


class SambaYConfig(DecoderConfig):
    """A `ModelConfig` as transformers keeps it; every field has the same meaning.

    The names transformers' own tools look for (num_attention_heads, num_key_value_heads,
    sliding_window, num_hidden_layers, layer_types) are understood and answered as well.

    Raises:
        ConfigError: a field that cannot work, naming it and the remedy.
    """

    model_type = "sambay"
    attribute_map: ClassVar = {
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "sliding_window": "window",
        "tie_embeddings": "tie_word_embeddings",
        "mamba_d_state": "d_state",
        "mamba_d_conv": "d_conv",
        "mamba_expand": "expand",
        "mamba_dt_rank": "dt_rank",
    }

    layer_pattern: str = _DEFAULTS.layer_pattern
    vocab_size: int = _DEFAULTS.vocab_size
    hidden_size: int = _DEFAULTS.hidden_size
    intermediate_size: int = _DEFAULTS.intermediate_size
    num_heads: int = _DEFAULTS.num_heads
    num_kv_heads: int = _DEFAULTS.num_kv_heads
    head_dim: int = _DEFAULTS.head_dim
    attention_scale: float | None = None
    window: int | list[int | None] | None = _DEFAULTS.window
    attention_variant: str = "softmax"
    attention_bias: bool = False
    position: str = "none"
    rope_theta: float | int = 10_000.0
    memory_source: str = "mamba"
    gated_memory: str = "plain"
    recurrent_kind: str = "mamba"
    recurrent_norm: str = "after_gate"
    recurrent_heads: int = 0
    recurrent_head_dim: int = 0
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | str = 0
    norm: str = "rms"
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    embedding_multiplier: float | int = 1.0
    residual_multiplier: float | int = 1.0
    logit_multiplier: float | int = 1.0
    max_position_embeddings: int = 1 << 20  # no limit of the architecture; tools ask for one
    init_scheme: str = "mup_released"
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    auto_map: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self, **kwargs: Any) -> None:
        given = {name: kwargs.pop(name, None) for name in _DERIVED}
        kwargs.pop("format_version", None)
        for alias in self.attribute_map.keys() & kwargs.keys():
            setattr(self, alias, kwargs.pop(alias))
        refuse_misspelt(kwargs, _MODEL_FIELDS)
        if self.attention_scale is None:
            self.attention_scale = self.head_dim**-0.5
        if self.dt_rank == "auto":
            self.dt_rank = 0
        if isinstance(self.window, list):
            self.window = _only_window(self.window)
        super().__post_init__(**kwargs)
        config = self.model_config()
        for name in _MODEL_FIELDS:  # defaults resolved, enumerations as text
            value = getattr(config, name)
            setattr(self, name, getattr(value, "value", value))
        for name, value in given.items():
            if value is not None and value != getattr(self, name):
                raise ConfigError(
                    f"{name} = {value} contradicts layer_pattern = '{self.layer_pattern}' "
                    f"({getattr(self, name)}); it is derived, leave it out"
                )

    @classmethod
    def from_model_config(cls, config: ModelConfig, **fields: Any) -> SambaYConfig:
        """The configuration of this architecture."""
        return cls(**config.to_dict(), **fields)

    def model_config(self) -> ModelConfig:
        """The architecture."""
        return ModelConfig.from_dict({name: getattr(self, name) for name in _MODEL_FIELDS})

    @property
    def num_hidden_layers(self) -> int:
        """The number of blocks."""
        return len(self.layers)

    num_layers = num_hidden_layers

    def to_dict(self) -> dict[str, Any]:
        """All fields but those that only other models have, with what follows from them."""
        fields = super().to_dict() | {
            "num_hidden_layers": self.num_hidden_layers,
            "layer_types": self.layer_types,
        }
        stored = self.model_config().to_dict()
        return {
            name: value
            for name, value in fields.items()
            if name in stored or name not in _MODEL_FIELDS
        }


class Phi4FlashConfig(DecoderConfig):
    """The configuration of the official checkpoints, under its own names.

    The defaults are those of microsoft/Phi-4-mini-flash-reasoning. `sliding_window` may be a
    number, a list with one entry per layer, or a number beside `layer_types`.

    Raises:
        ConfigError: a field that cannot work or that this package does not implement.
    """

    model_type = "phi4flash"
    attribute_map: ClassVar = {}

    vocab_size: int = 200_064
    hidden_size: int = 2560
    intermediate_size: int = 10_240
    num_hidden_layers: int = 32
    num_attention_heads: int = 40
    num_key_value_heads: int = 20
    mb_per_layer: int = 2
    sliding_window: int | list[int | None] | None = 512
    layer_norm_eps: float = 1e-5
    hidden_act: str = "silu"
    mlp_bias: bool = False
    lm_head_bias: bool = False
    attention_dropout: float | int = 0.0
    embd_pdrop: float | int = 0.0
    resid_pdrop: float | int = 0.0
    mamba_d_state: int = 16
    mamba_d_conv: int = 4
    mamba_expand: int = 2
    mamba_dt_rank: int | str = "auto"
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    max_position_embeddings: int = 262_144
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    init_scheme: str = "standard"
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    auto_map: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self, **kwargs: Any) -> None:
        given = kwargs.pop("layer_types", None)
        # How the original code computed attention; here the operations choose for themselves.
        kwargs.pop("_attn_implementation", None)
        super().__post_init__(**kwargs)
        fields = self._official_fields()
        if given is not None:
            fields["layer_types"] = given
        config = official.parse(fields)
        self.sliding_window = config.window

    def model_config(self) -> ModelConfig:
        """The architecture."""
        return official.parse(self._official_fields())

    @property
    def head_dim(self) -> int:
        """The width of one head."""
        return self.hidden_size // self.num_attention_heads

    def to_dict(self) -> dict[str, Any]:
        """All fields, with the layer types that follow from them."""
        return super().to_dict() | {"layer_types": self.layer_types}

    def _official_fields(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if value is not None} | {
            "model_type": self.model_type
        }


def _only_window(windows: list[int | None]) -> int | None:
    sizes = sorted({size for size in windows if size is not None})
    if len(sizes) > 1:
        raise ConfigError(
            f"sliding_window lists several sizes ({', '.join(map(str, sizes))}); all windowed "
            "layers of a model share one"
        )
    return sizes[0] if sizes else None
