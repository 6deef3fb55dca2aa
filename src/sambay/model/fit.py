"""Which configuration the tensors in a file would fit, told from their names and shapes."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping

from sambay.spec.layers import LayerKind
from sambay.spec.model_config import ModelConfig
from sambay.spec.pattern import format_pattern
from sambay.spec.recurrent import RecurrentKind

_MIXER = re.compile(r"blocks\.(\d+)\.mixer\.(.+)")
_RECURRENCES = {  # by a tensor that those before it do not have
    "x_proj.weight": RecurrentKind.MAMBA,
    "a_proj.weight": RecurrentKind.GATED_DELTA,
    "A_log": RecurrentKind.MAMBA2,
}
_READERS = (LayerKind.CROSS, LayerKind.GATED_MEMORY)


def explain_misfit(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What in `config` differs from what the tensors fit; empty where nothing can be told.

    `shapes` are by the model's own names (`blocks.0.mixer.in_proj.weight`), of any file.
    """
    found: dict[str, str | int | None] = {"layer_pattern": _pattern(config, shapes)}
    if embedding := shapes.get("embedding.weight"):
        found |= {"vocab_size": embedding[0], "hidden_size": embedding[-1]}
    found |= _kinds_of_layers(shapes)
    if narrowing := shapes.get("blocks.0.mlp.out_proj.weight"):
        found["intermediate_size"] = narrowing[-1]
    differing = [
        f"{name} = {value!r} (configured: {_plain(getattr(config, name))!r})"
        for name, value in found.items()
        if value is not None and value != getattr(config, name)
    ]
    return f"its tensors fit {', '.join(differing)}" if differing else ""


def _kinds_of_layers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str | int | None]:
    """Which recurrence there is and whether gated memory is normalised, where tensors tell."""
    told: dict[str, str | int | None] = {}
    for names in _mixers(shapes).values():
        kind = _kind(names)
        if kind is LayerKind.MAMBA and "A_log" in names:
            told["recurrent_kind"] = next(
                kind.value for sign, kind in _RECURRENCES.items() if sign in names
            )
        if kind is LayerKind.GATED_MEMORY:
            normalised = "norm.weight" in names
            told["gated_memory"] = "normalised" if normalised else "plain"
    return told


def _plain(value: object) -> object:
    return value.value if isinstance(value, enum.Enum) else value


def _mixers(shapes: Mapping[str, tuple[int, ...]]) -> dict[int, set[str]]:
    """The names of the tensors of every mixer, by its layer."""
    mixers: dict[int, set[str]] = {}
    for name in shapes:
        if match := _MIXER.fullmatch(name):
            mixers.setdefault(int(match[1]), set()).add(match[2])
    return mixers


def _pattern(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The pattern of the layers found, if every layer up to the last can be told."""
    mixers = _mixers(shapes)
    kinds = [_kind(mixers.get(index, set())) for index in range(max(mixers, default=-1) + 1)]
    if not kinds or None in kinds:
        return None
    configured = [layer.kind for layer in config.layers]
    if kinds == [LayerKind.SLIDING if kind is LayerKind.FULL else kind for kind in configured]:
        return config.layer_pattern
    # Elsewhere the last self-attention before the layers that read from it is the full one.
    readers = [index for index, kind in enumerate(kinds) if kind in _READERS]
    before = kinds[: readers[0]] if readers else []
    if LayerKind.SLIDING in before:
        last = len(before) - 1 - before[::-1].index(LayerKind.SLIDING)
        kinds[last] = LayerKind.FULL
    return format_pattern("".join(str(kind) for kind in kinds))


def _kind(names: set[str]) -> LayerKind | None:
    """The kind of a mixer by its tensors; SLIDING stands for both kinds of self-attention."""
    if names & {"A_log", "conv_weight", "x_proj.weight"}:
        return LayerKind.MAMBA
    if "q_proj.weight" in names:
        return LayerKind.SLIDING if "kv_proj.weight" in names else LayerKind.CROSS
    if {"in_proj.weight", "out_proj.weight"} <= names:
        return LayerKind.GATED_MEMORY
    return None
