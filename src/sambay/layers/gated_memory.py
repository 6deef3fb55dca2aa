"""The Gated Memory Unit: re-uses the token mixing of an earlier layer (arXiv 2507.06607)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from sambay.layers.context import BatchContext, SharedStates
from sambay.layers.norm import RMSNorm
from sambay.layers.projection import Linear, ResidualProjection, few_rows
from sambay.layers.roles import Role
from sambay.layers.slots import SlotLayer, SlotStep
from sambay.layers.state import LayerState
from sambay.ops.decode import gate_rows
from sambay.ops.gate import gated_product
from sambay.spec import GatedMemory, LayerSpec, ModelConfig

_NORMS: dict[GatedMemory, Callable[[ModelConfig], nn.Module]] = {
    GatedMemory.PLAIN: lambda config: nn.Identity(),
    GatedMemory.NORMALISED: lambda config: RMSNorm(config.memory_size, config.norm_eps),
}


class GatedMemoryUnit(nn.Module):
    """out_proj(norm(silu(in_proj x) * m)), where m is the published memory at the same column.

    The norm is none, or an RMSNorm over the whole memory behind the gate, for memories that the
    recurrence itself normalises behind its gate (nGMU, arXiv 2507.06607, section 2).
    """

    roles: ClassVar = {"in_proj.weight": Role.MATRIX, "out_proj.weight": Role.MATRIX}

    def __init__(self, config: ModelConfig, layer: LayerSpec) -> None:
        super().__init__()
        self.in_proj = Linear(config.hidden_size, config.memory_size, bias=False)
        self.norm = _NORMS[config.gated_memory](config)
        self.out_proj = ResidualProjection(config.memory_size, config.hidden_size, bias=False)

    def forward(
        self, x_BTD: Tensor, context: BatchContext, shared: SharedStates, state: LayerState | None
    ) -> tuple[Tensor, SharedStates]:
        """(B, T, D) to (B, T, D): the memory's last T columns are those of x; it is unchanged."""
        assert shared.memory is not None, "the pattern guarantees an earlier publisher"
        x = context.select(x_BTD)
        memory = shared.memory[:, shared.memory.shape[1] - x.shape[1] :]
        return self.out_proj(self.norm(gated_product(self.in_proj(x), memory))), shared

    def decode(
        self, x_BD: Tensor, step: SlotStep, shared: SharedStates, layer: SlotLayer
    ) -> tuple[Tensor, SharedStates]:
        """(B, D) to (B, D) for one token per slot."""
        assert shared.memory is not None, "the pattern guarantees an earlier publisher"
        gated = gate_rows(few_rows(self.in_proj, x_BD), shared.memory)
        if isinstance(self.norm, RMSNorm):
            gated = self.norm.decode(gated)
        return few_rows(self.out_proj, gated), shared
