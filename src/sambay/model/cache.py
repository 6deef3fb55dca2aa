"""The state of a whole model between forwards: one entry per layer that keeps any."""

from __future__ import annotations

import torch
from torch import Tensor

from sambay.errors import ConfigError
from sambay.layers.context import BatchContext
from sambay.layers.state import FullKV, KVState, LayerState, RecurrentState, WindowKV
from sambay.spec import LayerKind, LayerSpec, ModelConfig
from sambay.spec.recurrent import state_shape


class ModelCache:
    """Recurrent states, window rings, and the keys and values that grow.

    Gated memory units and cross-attention own nothing. Rows are left-padded, so all rows stand at
    the same column: `length` counts the columns seen so far, padding included.
    """

    def __init__(self, layers: list[LayerState | None], starts: Tensor | None) -> None:
        self.layers = layers
        self.length = 0
        self.starts = starts
        self.max_start = 0 if starts is None else int(starts.max())

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str,
        starts: Tensor | None = None,
    ) -> ModelCache:
        """An empty cache for `capacity` columns of `batch_size` rows.

        `dtype` is that of keys and values; recurrent states are float32. `starts` (B,) int64 is
        the number of left-padding columns of each row.

        Raises:
            ConfigError: a capacity or batch size below 1.
        """
        for name, value in (("batch_size", batch_size), ("capacity", capacity)):
            if value < 1:
                raise ConfigError(f"cache: {name} = {value}; it must be 1 or more")
        device = torch.device(device)

        def state(layer: LayerSpec) -> LayerState | None:
            if layer.kind is LayerKind.MAMBA:
                return RecurrentState(batch_size, state_shape(config), device)
            if not layer.kind.keeps_state:
                return None
            kind = FullKV if layer.kind is LayerKind.FULL else WindowKV
            size = (batch_size, config.num_kv_heads, capacity, config.head_dim)
            return kind(*size, dtype, device, layer.window)

        return cls([state(layer) for layer in config.layers], starts)

    @property
    def nbytes(self) -> int:
        """The bytes of all buffers."""
        return sum(layer.nbytes for layer in self.layers if layer is not None)

    def context(self, num_columns: int) -> BatchContext:
        """The context of a forward over the next `num_columns` columns."""
        return BatchContext(self.length, num_columns, self.starts, self.max_start)

    def select_rows(self, index: Tensor) -> None:
        """Keep only the rows in `index` (int64), in that order: finished rows leave the batch."""
        for layer in self.layers:
            if layer is not None:
                layer.select_rows(index)
        if self.starts is not None:
            self.starts = self.starts[index]
            self.max_start = int(self.starts.max()) if len(index) else 0

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` columns in the layers that keep keys and values."""
        for layer in self.layers:
            if isinstance(layer, KVState):
                layer.reserve(capacity)
