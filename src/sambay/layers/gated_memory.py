"""The Gated Memory Unit: re-uses the token mixing of an earlier layer (arXiv 2507.06607)."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from sambay.layers.context import BatchContext, SharedStates
from sambay.layers.projection import ResidualProjection
from sambay.layers.roles import Role
from sambay.layers.state import LayerState
from sambay.spec import LayerSpec, ModelConfig


class GatedMemoryUnit(nn.Module):
    """out_proj(silu(in_proj x) * m), where m is the published memory at the same column."""

    roles: ClassVar = {"in_proj.weight": Role.MATRIX, "out_proj.weight": Role.MATRIX}

    def __init__(self, config: ModelConfig, layer: LayerSpec) -> None:
        super().__init__()
        self.in_proj = nn.Linear(config.hidden_size, config.memory_size, bias=False)
        self.out_proj = ResidualProjection(config.memory_size, config.hidden_size, bias=False)

    def forward(
        self, x_BTD: Tensor, context: BatchContext, shared: SharedStates, state: LayerState | None
    ) -> tuple[Tensor, SharedStates]:
        """(B, T, D) to (B, T, D): the memory's last T columns are those of x; it is unchanged."""
        assert shared.memory is not None, "the pattern guarantees an earlier publisher"
        x = context.select(x_BTD)
        memory = shared.memory[:, shared.memory.shape[1] - x.shape[1] :]
        return self.out_proj(F.silu(self.in_proj(x)) * memory), shared
