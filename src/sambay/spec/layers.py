"""What each layer is and whose memory and keys it reads, resolved once from the pattern."""

from __future__ import annotations

import dataclasses
import enum

from sambay.errors import ConfigError
from sambay.spec.pattern import parse_pattern


class LayerKind(enum.StrEnum):
    """The token mixer of a layer; the value is its letter in the pattern."""

    MAMBA = "M"
    SLIDING = "S"
    FULL = "F"
    GATED_MEMORY = "G"
    CROSS = "C"

    @property
    def keeps_state(self) -> bool:
        """Whether the layer carries state from token to token (and so must see every token)."""
        return self in (LayerKind.MAMBA, LayerKind.SLIDING, LayerKind.FULL)


class MemorySource(enum.StrEnum):
    """The tensor the gated memory units read (arXiv 2507.06607, section 2 and ablations)."""

    MAMBA = "mamba"  # scan output of the nearest earlier M, with the D skip, before its gate
    ATTENTION = "attention"  # heads of the nearest earlier F, before its output projection
    MLP = "mlp"  # value half of the SwiGLU of the nearest earlier F, before its gate


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One layer of the stack.

    `kv_from` and `memory_from` are indices of the layers read; `publishes_kv` and
    `publishes_memory` are set only where a later layer reads, so nobody pays for the rest.
    """

    index: int
    kind: LayerKind
    window: int | None = None
    kv_from: int | None = None
    memory_from: int | None = None
    publishes_kv: bool = False
    publishes_memory: MemorySource | None = None


def resolve_layers(
    pattern: str, *, window: int | None, memory_source: MemorySource
) -> tuple[LayerSpec, ...]:
    """The typed layers of a pattern text, with every reader bound to its source.

    Raises:
        ConfigError: a reader without a source, or S layers without a window.
    """
    letters = parse_pattern(pattern)
    memory_letter = LayerKind.MAMBA if memory_source is MemorySource.MAMBA else LayerKind.FULL
    layers: list[LayerSpec] = []
    for index, letter in enumerate(letters):
        kind = LayerKind(letter)
        kv_from = memory_from = None
        if kind is LayerKind.CROSS:
            kv_from = _source(letters, index, LayerKind.FULL, "keys and values")
        if kind is LayerKind.GATED_MEMORY:
            memory_from = _source(letters, index, memory_letter, f"a {memory_source} memory")
        if kind is LayerKind.SLIDING and window is None:
            raise ConfigError(f"window: layer {index} (S) needs one; set it to 1 or more")
        layers.append(
            LayerSpec(
                index,
                kind,
                window=window if kind is LayerKind.SLIDING else None,
                kv_from=kv_from,
                memory_from=memory_from,
            )
        )
    kv_sources = {layer.kv_from for layer in layers}
    memory_sources = {layer.memory_from for layer in layers}
    return tuple(
        dataclasses.replace(
            layer,
            publishes_kv=layer.index in kv_sources,
            publishes_memory=memory_source if layer.index in memory_sources else None,
        )
        for layer in layers
    )


def prefill_split(layers: tuple[LayerSpec, ...]) -> int:
    """The index of the last layer that keeps state.

    Layers before it must process every prompt token; this layer must update its state for every
    token; its output and all later layers are needed only where logits are wanted
    (arXiv 2507.06607, section 2: linear prefill).
    """
    return max((layer.index for layer in layers if layer.kind.keeps_state), default=0)


def _source(letters: str, index: int, wanted: LayerKind, what: str) -> int:
    source = letters.rfind(wanted, 0, index)
    if source < 0:
        raise ConfigError(
            f"layer_pattern: layer {index} ({letters[index]}) reads {what} but there is no earlier "
            f"{wanted} layer; put {wanted} before it"
        )
    return source
