"""Which modules low-rank adapters may replace, for every kind of layer.

The same last names (in_proj, out_proj) stand for different things in different layers, so a list
of suffixes cannot say "the gated memory units". `target_modules` writes a pattern over the whole
path instead. This file needs neither peft nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from sambay.errors import ConfigError, nearest
from sambay.spec import LayerKind, ModelConfig

MLP = "mlp"

# Every linear layer between embedding and head. Not among them: the depth-wise convolution, decay
# rates, time-step bias, skip and lambdas, which are not matrices and stay as they were trained.
TARGETS: dict[str, tuple[str, ...]] = {
    "mamba": ("in_proj", "x_proj", "dt_proj", "out_proj"),
    "mamba2": ("in_proj", "out_proj"),
    "gated_delta": ("q_proj", "k_proj", "v_proj", "g_proj", "a_proj", "b_proj", "out_proj"),
    "attention": ("q_proj", "kv_proj", "out_proj"),
    "cross_attention": ("q_proj", "out_proj"),
    "gated_memory": ("in_proj", "out_proj"),
    MLP: ("in_proj", "out_proj"),
}

_KINDS = {
    LayerKind.SLIDING: "attention",
    LayerKind.FULL: "attention",
    LayerKind.CROSS: "cross_attention",
    LayerKind.GATED_MEMORY: "gated_memory",
}


class HasModelConfig(Protocol):
    """A configuration of transformers for one of our models."""

    def model_config(self) -> ModelConfig: ...


def target_modules(config: ModelConfig | HasModelConfig, kinds: Iterable[str] | None = None) -> str:
    """A regular expression for `peft.LoraConfig(target_modules=...)`; it matches whole paths.

    config: `model.config` of the model that is going to be adapted.
    kinds: keys of `TARGETS`, for all modules of that kind, or "kind.module" for one of them
        ("mamba.out_proj"). None, which is recommended: every linear layer of every kind this
        model has, as peft's "all-linear" finds them.

    Raises:
        ConfigError: an unknown kind or module, or one this model has none of.
    """
    if isinstance(kinds, str):
        kinds = (kinds,)
    architecture = config if isinstance(config, ModelConfig) else config.model_config()
    places = _places(architecture)
    chosen = [_parse(entry, places) for entry in (places if kinds is None else kinds)]
    if not chosen:
        raise ConfigError(f"kinds: empty; name some of {', '.join(places)}, or leave it out")
    wanted: dict[str, set[str]] = {}
    for kind, modules in chosen:
        wanted.setdefault(kind, set()).update(modules)
    paths = [
        rf"{places[kind]}\.{_either(name for name in TARGETS[kind] if name in wanted[kind])}"
        for kind in places
        if kind in wanted
    ]
    return rf"(?:.*\.)?blocks\.{_either(paths)}"


def kinds_of(config: ModelConfig) -> tuple[str, ...]:
    """The keys of `TARGETS` that a model has layers of."""
    return tuple(_places(config))


def _places(config: ModelConfig) -> dict[str, str]:
    """For every kind the model has, a pattern for the modules that hold its matrices."""
    indices: dict[str, list[str]] = {}
    for layer in config.layers:
        recurrent = layer.kind is LayerKind.MAMBA
        kind = config.recurrent_kind.value if recurrent else _KINDS[layer.kind]
        indices.setdefault(kind, []).append(str(layer.index))
    places = {kind: rf"{_either(found)}\.mixer" for kind, found in indices.items()}
    return {kind: places[kind] for kind in TARGETS if kind in places} | {MLP: r"\d+\.mlp"}


def _parse(entry: str, places: dict[str, str]) -> tuple[str, tuple[str, ...]]:
    """The kind, and which of its modules."""
    kind, _, module = entry.partition(".")
    if kind not in TARGETS:
        raise ConfigError(f"kinds: '{entry}' is no kind of layer{nearest(kind, TARGETS)}")
    if kind not in places:
        raise ConfigError(
            f"kinds: this model has no {kind} layers to adapt; it has {', '.join(places)}"
        )
    if not module:
        return kind, TARGETS[kind]
    if module not in TARGETS[kind]:
        raise ConfigError(
            f"kinds: '{entry}': {kind} has no such module{nearest(module, TARGETS[kind])}"
        )
    return kind, (module,)


def _either(options: Iterable[str]) -> str:
    return f"(?:{'|'.join(options)})"
