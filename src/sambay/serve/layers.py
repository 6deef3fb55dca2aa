"""The MLP and the gated memory unit, divided among processes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sambay.errors import MissingPackage
from sambay.layers.norm import RMSNorm
from sambay.spec import GatedMemory, LayerSpec, MemorySource, ModelConfig

try:
    from vllm.model_executor.layers.linear import (
        ColumnParallelLinear,
        MergedColumnParallelLinear,
        RowParallelLinear,
    )
except ModuleNotFoundError as error:
    raise MissingPackage("vllm", "serving", "vllm") from error


class ServedMLP(nn.Module):
    """out_proj(silu(gate) * value); may publish its value half as the memory."""

    def __init__(self, config: ModelConfig, layer: LayerSpec, prefix: str) -> None:
        super().__init__()
        D, size = config.hidden_size, config.intermediate_size
        self.in_proj = MergedColumnParallelLinear(
            D, [size, size], bias=False, prefix=f"{prefix}.in_proj"
        )
        self.out_proj = RowParallelLinear(size, D, bias=False, prefix=f"{prefix}.out_proj")
        self.publishes_memory = layer.publishes_memory is MemorySource.MLP

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """(T, D) to (T, D), and the memory if this layer publishes it."""
        gate, value = self.in_proj(x_TD)[0].chunk(2, dim=-1)
        y = self.out_proj(F.silu(gate) * value)[0]
        return y, value if self.publishes_memory else None


class ServedGatedMemoryUnit(nn.Module):
    """out_proj(norm(silu(in_proj x) * m)), where m is divided as its publisher is."""

    def __init__(self, config: ModelConfig, prefix: str) -> None:
        super().__init__()
        D, size = config.hidden_size, config.memory_size
        self.in_proj = ColumnParallelLinear(D, size, bias=False, prefix=f"{prefix}.in_proj")
        self.norm = None
        if config.gated_memory is GatedMemory.NORMALISED:
            self.norm = RMSNorm(size, config.norm_eps)
        self.out_proj = RowParallelLinear(size, D, bias=False, prefix=f"{prefix}.out_proj")

    def forward(self, x_TD: Tensor, memory: Tensor) -> Tensor:
        """(T, D) and the memory of the same tokens to (T, D)."""
        y = F.silu(self.in_proj(x_TD)[0]) * memory
        return self.out_proj(y if self.norm is None else self.norm(y))[0]
