"""The SwiGLU MLP (arXiv 2002.05202) that every block carries."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from sambay.layers.context import SharedStates
from sambay.layers.projection import Linear, ResidualProjection, few_rows
from sambay.layers.roles import Role
from sambay.ops.decode import gate_rows
from sambay.ops.gate import gated_product
from sambay.spec import LayerSpec, MemorySource, ModelConfig


class SwiGLU(nn.Module):
    """out_proj(silu(gate) * value); `in_proj` holds the gate rows first, then the value rows."""

    roles: ClassVar = {"in_proj.weight": Role.MATRIX, "out_proj.weight": Role.MATRIX}
    halves: ClassVar = ("in_proj.weight",)

    def __init__(self, config: ModelConfig, layer: LayerSpec) -> None:
        super().__init__()
        self.in_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.out_proj = ResidualProjection(config.intermediate_size, config.hidden_size, bias=False)
        self.publishes_memory = layer.publishes_memory is MemorySource.MLP

    def forward(self, x_BTD: Tensor, shared: SharedStates) -> tuple[Tensor, SharedStates]:
        """(B, T, D) to (B, T, D); may publish its value half as the memory."""
        gate, value = self.in_proj(x_BTD).chunk(2, dim=-1)
        if self.publishes_memory:
            shared = shared._replace(memory=value)
        return self.out_proj(gated_product(gate, value)), shared

    def decode(self, x_BD: Tensor, shared: SharedStates) -> tuple[Tensor, SharedStates]:
        """(B, D) to (B, D) for one token per slot."""
        gate, value = few_rows(self.in_proj, x_BD).chunk(2, dim=-1)
        if self.publishes_memory:
            shared = shared._replace(memory=value)
        return few_rows(self.out_proj, gate_rows(gate, value)), shared
