"""The config.json of Phi4Flash models to and from `ModelConfig`.

Source: configuration_phi4flash.py and config.json of microsoft/Phi-4-mini-flash-reasoning. Its
class has defaults that belong to no released model (51,200 tokens, a window of 2,047); fields with
such a default must be in the file. `sliding_window` is written as one number, and read as that, as
a list per layer (what the class makes of it), or with `layer_types`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from sambay.errors import ConfigError
from sambay.spec import (
    AttentionVariant,
    GatedMemory,
    LayerKind,
    MemorySource,
    ModelConfig,
    Norm,
    Position,
    RecurrentKind,
    format_pattern,
    parse_pattern,
    presets,
)

MODEL_TYPE, ARCHITECTURE = "phi4flash", "Phi4FlashForCausalLM"

_REQUIRED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
}
_MAMBA = {"mamba_d_state": "d_state", "mamba_d_conv": "d_conv", "mamba_expand": "expand"}
_MAMBA_DEFAULTS = {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2}
# Switches of the class of which only this setting is the architecture.
_FIXED: dict[str, Any] = {
    "mb_per_layer": 2,
    "hidden_act": "silu",
    "mlp_bias": False,
    "lm_head_bias": False,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}
_SUBNORM_EPS = 1e-5  # of the class, for the norm inside differential attention; no field
_UNLIMITED = (LayerKind.FULL, LayerKind.CROSS)
_FOLD = "it has no multipliers; fold them into the weights first"
_RELEASED_VOCABULARY = 200_064
_END_OF_TEXT = 199_999  # the only ids that can be known here, in the released vocabulary
_HINTS = {
    "phi3": "Phi-4-mini and its relatives are plain Transformers, use transformers for them",
    "llama": "a plain Transformer, use transformers for it",
}


def describe(config: ModelConfig) -> dict[str, Any]:
    """The official config.json of a model, without entries that other programs add.

    Raises:
        ConfigError: the official class cannot express this model; names the field and the reason.
    """
    _check_expressible(config)
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "layer_norm_eps": config.norm_eps,
        "max_position_embeddings": 262_144,
        "mb_per_layer": 2,
        "num_hidden_layers": config.num_layers,
        "sliding_window": config.window,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "mlp_bias": False,
        "lm_head_bias": False,
    }
    values |= {theirs: getattr(config, ours) for theirs, ours in _REQUIRED.items()}
    for theirs, ours in _MAMBA.items():
        if getattr(config, ours) != _MAMBA_DEFAULTS[theirs]:
            values[theirs] = getattr(config, ours)
    if config.dt_rank != math.ceil(config.hidden_size / 16):
        values["mamba_dt_rank"] = config.dt_rank
    if config.vocab_size == _RELEASED_VOCABULARY:
        values |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _END_OF_TEXT)
    return values


def extend(config: ModelConfig, extra: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The config.json to write: `extra` as it is if it says the same, else corrected by ours.

    Raises:
        ConfigError: as `describe`.
    """
    values = describe(config)
    if _says(extra, config):
        values = dict(extra)
    else:
        kept = {
            name: value
            for name, value in extra.items()
            if name not in ("layer_types", "mamba_dt_rank", *_MAMBA)
        }
        values = {**kept, **values}
    key = "dtype" if "dtype" in values else "torch_dtype"
    return values | {key: str(dtype).removeprefix("torch.")}


def parse(values: Mapping[str, Any]) -> ModelConfig:
    """The configuration in an official config.json.

    Raises:
        ConfigError: another model type, a missing field, windows that contradict the layers (names
            the layer), or a setting that the architecture does not have.
    """
    if values.get("model_type") != MODEL_TYPE:
        raise ConfigError(other_model_type(values.get("model_type")))
    for name in (*_REQUIRED, "num_hidden_layers", "sliding_window"):
        if name not in values:
            raise ConfigError(
                f"{name} is missing, and the default of the official class is not the released "
                "model's; add it"
            )
    for name, setting in _FIXED.items():
        if values.get(name, setting) != setting:
            raise ConfigError(
                f"{name} = {values[name]!r}; only {setting!r} is implemented for {MODEL_TYPE}"
            )
    if values.get("layer_norm_eps", _SUBNORM_EPS) != _SUBNORM_EPS:
        raise ConfigError(
            f"layer_norm_eps = {values['layer_norm_eps']!r}; only {_SUBNORM_EPS} is implemented, "
            "which the norm inside the attention always has"
        )
    depth = values["num_hidden_layers"]
    if type(depth) is not int or depth < 4 or depth % 4:
        raise ConfigError(f"num_hidden_layers = {depth!r}; it must be a positive multiple of 4")
    fields = {ours: values[theirs] for theirs, ours in _REQUIRED.items()}
    for name, value in fields.items():
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name} = {value!r}; it must be a whole number of 1 or more")
    if fields["hidden_size"] % fields["num_heads"]:
        raise ConfigError(
            f"num_attention_heads = {fields['num_heads']} does not divide hidden_size = "
            f"{fields['hidden_size']}; correct one of them"
        )
    dt_rank = values.get("mamba_dt_rank", "auto")
    pattern = _pattern(depth)
    return ModelConfig(
        **fields,
        layer_pattern=pattern,
        head_dim=(head_dim := fields["hidden_size"] // fields["num_heads"]),
        attention_scale=1 / math.sqrt(head_dim),
        window=_window(values, pattern),
        attention_variant=AttentionVariant.DIFFERENTIAL,
        attention_bias=True,
        norm=Norm.LAYER,
        norm_eps=_SUBNORM_EPS,
        dt_rank=0 if dt_rank == "auto" else dt_rank,
        tie_embeddings=values.get("tie_word_embeddings", True),
        **{ours: values.get(name, _MAMBA_DEFAULTS[name]) for name, ours in _MAMBA.items()},
    )


def other_model_type(found: object) -> str:
    """What to say of a config.json with another `model_type`."""
    if found is None:
        return (
            f"there is no model_type; expected 'sambay' or '{MODEL_TYPE}' "
            "(a run directory of `sambay train` is given to `sambay generate` as it is)"
        )
    hint = _HINTS.get(str(found), f"sambay reads 'sambay' and '{MODEL_TYPE}'")
    if found == "sambay":
        hint = "that is sambay's own format; load it with sambay.hf.loading.load_model"
    return f"model_type = {found!r}: {hint}"


def _says(values: Mapping[str, Any], config: ModelConfig) -> bool:
    try:
        return parse(values) == config
    except ConfigError:
        return False


def _window(values: Mapping[str, Any], pattern: str) -> int:
    """The one window of all sliding layers, from any of the three spellings."""
    given, types = values["sliding_window"], values.get("layer_types")
    kinds = [LayerKind(letter) for letter in parse_pattern(pattern)]
    for name, entries in (("sliding_window", given), ("layer_types", types)):
        if isinstance(entries, list) and len(entries) != len(kinds):
            raise ConfigError(
                f"{name} has {len(entries)} entries for {len(kinds)} layers; give one for each"
            )
    window: int | None = None
    for index, kind in enumerate(kinds):
        size = given[index] if isinstance(given, list) else given
        if kind is LayerKind.SLIDING:
            window = size if window is None else window
            if type(size) is not int or size < 1 or size != window:
                where = f"[{index}]" if isinstance(given, list) else ""
                raise ConfigError(
                    f"sliding_window{where} = {size!r}; layer {index} has a window, all "
                    "windows are equal and count 1 position or more"
                )
        elif isinstance(given, list) and kind in _UNLIMITED and size is not None:
            raise ConfigError(
                f"sliding_window[{index}] = {size!r}; layer {index} attends to "
                "everything, its entry must be null"
            )
        if types is not None and kind in (LayerKind.SLIDING, *_UNLIMITED):
            wanted = "sliding" if kind is LayerKind.SLIDING else "full"
            if (types[index] == "sliding_attention") != (wanted == "sliding"):
                raise ConfigError(
                    f"layer_types[{index}] = {types[index]!r}; layer {index} "
                    f"has {wanted} attention in this architecture"
                )
    assert window is not None, "the pattern has windows at every depth"
    return window


def _check_expressible(config: ModelConfig) -> None:
    """Raise the first reason why the official class cannot express a model."""
    depth, head_dim = config.num_layers, config.head_dim
    if config.recurrent_kind is not RecurrentKind.MAMBA:
        raise _refusal("recurrent_kind", config.recurrent_kind, "its recurrent layers are Mamba-1")
    if depth % 4 or config.layer_pattern != _canonical(depth):
        wanted = f"'{_canonical(depth)}' at this depth" if depth % 4 == 0 else "a multiple of 4"
        raise _refusal("layer_pattern", config.layer_pattern, f"its layers are {wanted}")
    for name, needed, why in (
        ("norm", Norm.LAYER, "it has LayerNorm everywhere"),
        ("norm_eps", _SUBNORM_EPS, "the norm inside its attention is fixed"),
        ("attention_variant", AttentionVariant.DIFFERENTIAL, "all its attention is differential"),
        ("attention_bias", True, "its attention has biases"),
        ("position", Position.NONE, "it has no positions"),
        ("memory_source", MemorySource.MAMBA, "its memory is that of the last Mamba layer"),
        ("gated_memory", GatedMemory.PLAIN, "its gated memory units have no norm"),
        ("embedding_multiplier", 1.0, _FOLD),
        ("residual_multiplier", 1.0, _FOLD),
        ("logit_multiplier", 1.0, _FOLD),
    ):
        if getattr(config, name) != needed:
            raise _refusal(name, getattr(config, name), why)
    if head_dim * config.num_heads != config.hidden_size:
        raise _refusal("head_dim", head_dim, "its heads divide hidden_size among them")
    if not math.isclose(config.attention_scale, 1 / math.sqrt(head_dim), rel_tol=1e-12):
        raise _refusal(
            "attention_scale", config.attention_scale, f"it is 1/sqrt(head_dim); {_FOLD}"
        )


def _pattern(depth: int) -> str:
    return presets.PRESETS["sambay+da"].pattern(depth)


def _canonical(depth: int) -> str:
    return format_pattern(parse_pattern(_pattern(depth))) if depth % 4 == 0 else ""


def _refusal(name: str, value: object, why: str) -> ConfigError:
    return ConfigError(f"model.{name} = {value!s} does not fit {ARCHITECTURE}: {why}")
