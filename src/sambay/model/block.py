"""One block: a mixer and an MLP, each behind its norm, on a float32 residual stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sambay.layers.attention import CrossAttention, SelfAttention
from sambay.layers.context import BatchContext, SharedStates
from sambay.layers.gated_delta import GatedDelta
from sambay.layers.gated_memory import GatedMemoryUnit
from sambay.layers.mamba import Mamba
from sambay.layers.mamba2 import Mamba2
from sambay.layers.mlp import SwiGLU
from sambay.layers.norm import make_norm
from sambay.layers.slots import SlotLayer, SlotStep
from sambay.layers.state import LayerState
from sambay.ops.decode import add_rows
from sambay.spec import LayerKind, LayerSpec, ModelConfig, RecurrentKind

RECURRENCES: dict[RecurrentKind, type[nn.Module]] = {
    RecurrentKind.MAMBA: Mamba,
    RecurrentKind.MAMBA2: Mamba2,
    RecurrentKind.GATED_DELTA: GatedDelta,
}
MIXERS: dict[LayerKind, type[nn.Module]] = {
    LayerKind.SLIDING: SelfAttention,
    LayerKind.FULL: SelfAttention,
    LayerKind.GATED_MEMORY: GatedMemoryUnit,
    LayerKind.CROSS: CrossAttention,
}


def mixer_class(config: ModelConfig, kind: LayerKind) -> type[nn.Module]:
    """The class of the mixers of a kind of layer."""
    return RECURRENCES[config.recurrent_kind] if kind is LayerKind.MAMBA else MIXERS[kind]


class Block(nn.Module):
    """x + rm * mixer(norm(x)), then x + rm * mlp(norm(x)); rm is the residual multiplier."""

    def __init__(self, config: ModelConfig, layer: LayerSpec) -> None:
        super().__init__()
        self.mixer_norm = make_norm(config)
        self.mixer = mixer_class(config, layer.kind)(config, layer)
        self.mlp_norm = make_norm(config)
        self.mlp = SwiGLU(config, layer)
        self.residual_multiplier = config.residual_multiplier

    def forward(
        self, x_BTD: Tensor, context: BatchContext, shared: SharedStates, state: LayerState | None
    ) -> tuple[Tensor, SharedStates]:
        """(B, T, D) float32 to (B, T or keep, D) float32, and what is shared from here on."""
        y, shared = self.mixer(self.mixer_norm(x_BTD), context, shared, state)
        x_BTD = torch.add(context.select(x_BTD), y, alpha=self.residual_multiplier)
        y, shared = self.mlp(self.mlp_norm(x_BTD), shared)
        return torch.add(x_BTD, y, alpha=self.residual_multiplier), shared

    def decode(
        self, x_BD: Tensor, step: SlotStep, shared: SharedStates, layer: SlotLayer
    ) -> tuple[Tensor, SharedStates]:
        """(B, D) float32 to (B, D) float32 for one token per slot."""
        mix: Any = self.mixer.decode  # every class of mixers has one of its own
        y, shared = mix(self.mixer_norm.decode(x_BD), step, shared, layer)
        x_BD = add_rows(x_BD, y, factor=self.residual_multiplier)
        y, shared = self.mlp.decode(self.mlp_norm.decode(x_BD), shared)
        return add_rows(x_BD, y, factor=self.residual_multiplier), shared
