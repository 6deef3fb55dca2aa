"""The caches of transformers as the layer states of this package.

`DynamicCache` and `StaticCache` build one layer per entry of `config.layer_types`. The adapters
below let our mixers read and write those layers, so everything transformers does to a cache (beam
reordering, offloading, resetting, handing it to the next call) works.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer

from sambay.errors import ConfigError
from sambay.layers.context import BatchContext
from sambay.layers.state import LayerState
from sambay.spec import LayerKind, LayerSpec, ModelConfig
from sambay.spec.recurrent import state_shape

SELF_ATTENTION = (LayerKind.FULL, LayerKind.SLIDING)  # their cache layers count columns


class RecurrentLayer(LayerState):
    """A linear-attention cache layer as the state of a recurrent mixer.

    Kept in float32: `conv_states[0]` is (B, d_conv - 1, channels), oldest first,
    `recurrent_states[0]` is (B, E, N), (B, H, P, N) or (B, H, K, V), see `StateShape`. The layer
    owns the tensors; the mixer writes them in place.
    """

    def __init__(self, layer: Any, config: ModelConfig, batch: int, device: torch.device) -> None:
        if not layer.is_recurrent_states_initialized[0]:
            shape, options = state_shape(config), {"dtype": torch.float32, "device": device}
            layer.conv_states[0] = torch.zeros(batch, *shape.conv, **options)
            layer.recurrent_states[0] = torch.zeros(batch, *shape.ssm, **options)
            layer.conv_kernel_size[0] = config.d_conv - 1
            layer.dtype, layer.device = torch.float32, device
            layer.is_conv_states_initialized[0] = layer.is_recurrent_states_initialized[0] = True
        found = layer.recurrent_states[0].shape[0]
        if found != batch:
            raise ConfigError(
                f"past_key_values holds {found} rows, the input {batch}; continue a cache with as "
                "many rows as it was filled with"
            )
        layer.has_previous_state[0] = True
        super().__init__(conv=layer.conv_states[0], ssm=layer.recurrent_states[0])


class AttentionLayer(LayerState):
    """A key-value cache layer, dynamic or static, full or windowed, as the state of attention."""

    def __init__(self, cache: Cache, index: int) -> None:
        super().__init__()
        self.cache, self.index = cache, index

    def append(
        self, keys: Tensor, values: Tensor, context: BatchContext
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store (B, K, T, P) new columns; returns all that can be seen, and `starts` among them.

        Raises:
            ConfigError: a static cache has no room left.
        """
        end = context.offset + keys.shape[2]
        layer = self.cache.layers[self.index] if self.index < len(self.cache.layers) else None
        if layer is not None and not getattr(layer, "is_sliding", False):
            room = layer.get_max_length() if hasattr(layer, "get_max_length") else -1
            if 0 <= room < end:
                raise ConfigError(
                    f"past_key_values: column {end} does not fit a static cache of {room}; "
                    "give it a larger max_cache_len"
                )
        if type(layer) is DynamicLayer and layer.is_initialized and _may_grow(self.cache):
            keys, values = _grow(layer, keys, values)
        else:
            keys, values = self.cache.update(keys, values, self.index)
        keys, values = keys[:, :, :end], values[:, :, :end]  # static buffers come back whole
        first = end - keys.shape[2]
        if context.starts is None or context.max_start <= first:
            return keys, values, None
        return keys, values, context.starts - first


def _may_grow(cache: Cache) -> bool:
    return not torch.is_grad_enabled() and not getattr(cache, "offloading", False)


def _grow(layer: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Append to a dynamic layer without copying what it holds at every step.

    `layer.keys` and `layer.values` become views of roomier buffers that are kept beside them.
    Whenever somebody has put other tensors there (beam search does), new buffers are made.
    """
    rooms = layer.__dict__.setdefault("_rooms", {})
    for name, new in (("keys", keys), ("values", values)):
        old, (room, end) = getattr(layer, name), rooms.get(name, (None, 0))
        T, length = new.shape[2], old.shape[2]
        if (
            room is None
            or room.data_ptr() != old.data_ptr()
            or room.stride() != old.stride()
            or end != length
            or room.shape[2] < length + T
            or (room.is_inference() and not torch.is_inference_mode_enabled())
        ):
            B, K, _, P = old.shape
            room = old.new_empty(B, K, length + T + max(length // 4, 64), P)
            room[:, :, :length] = old
        room[:, :, length : length + T] = new
        rooms[name] = (room, length + T)
        setattr(layer, name, room[:, :, : length + T])
    return layer.keys, layer.values


def columns_seen(cache: Cache | None, layers: Sequence[LayerSpec]) -> int:
    """How many columns a cache holds; 0 where no layer counts them (a model without attention)."""
    if cache is None:
        return 0
    for layer in layers:
        if layer.kind in SELF_ATTENTION:
            return int(cache.get_seq_length(layer.index))
    return 0


def layer_states(
    cache: Cache | None,
    config: ModelConfig,
    batch: int,
    devices: Sequence[torch.device],
) -> list[LayerState | None]:
    """One adapter for every layer that keeps state, on the device its block computes on.

    Raises:
        ConfigError: a cache that was not built for this configuration.
    """
    if cache is None:
        return [None] * config.num_layers
    states: list[LayerState | None] = []
    for spec, device in zip(config.layers, devices, strict=True):
        if spec.kind is LayerKind.MAMBA:
            layer = cache.layers[spec.index] if spec.index < len(cache.layers) else None
            if not hasattr(layer, "recurrent_states"):
                raise ConfigError(
                    f"past_key_values: layer {spec.index} is "
                    f"{'missing' if layer is None else 'a ' + type(layer).__name__}, a recurrent "
                    "layer needs a state; build the cache with config=model.config"
                )
            states.append(RecurrentLayer(layer, config, batch, device))
        elif spec.kind.keeps_state:
            states.append(AttentionLayer(cache, spec.index))
        else:
            states.append(None)
    return states
