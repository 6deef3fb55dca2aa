"""Attention mixers: self-attention (windowed or full) and cross-attention to published keys.

Shape letters: B batch, T columns, D hidden, H query heads, K key heads, P head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sambay.layers.context import BatchContext, SharedStates
from sambay.layers.own_part import own_part
from sambay.layers.precision import Float32Parameters
from sambay.layers.projection import Linear, ResidualProjection, few_rows
from sambay.layers.roles import Role
from sambay.layers.rope import make_position
from sambay.layers.slots import SlotLayer, SlotStep
from sambay.layers.state import KVState, LayerState
from sambay.ops.attention import attention
from sambay.ops.decode import decode_attention, decode_differential_attention, store_columns
from sambay.ops.differential import differential_attention, lambda_init
from sambay.spec import AttentionVariant, LayerSpec, MemorySource, ModelConfig


class SoftmaxMaps(nn.Module):
    """One softmax map per query head."""

    def __init__(self, config: ModelConfig, layer: LayerSpec) -> None:
        super().__init__()
        self.scale, self.window = config.attention_scale, layer.window
        self.dropout = 0.0  # of the probabilities, while training

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, segments: Tensor | None
    ) -> Tensor:
        """(B, H, T, P) queries to (B, T, H * P)."""
        out = attention(
            q,
            k,
            v,
            scale=self.scale,
            window=self.window,
            starts_B=starts,
            segments_BT=segments,
            dropout=self.dropout if self.training else 0.0,
        )
        return out.transpose(1, 2).flatten(2)

    def decode_constants(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def decode(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, constants: Mapping[str, Tensor]
    ) -> Tensor:
        """(B, H, P) queries to (B, H * P) for one token per slot."""
        return decode_attention(q, k, v, lengths, scale=self.scale).flatten(1)


class DifferentialMaps(Float32Parameters):
    """The difference of two maps per pair of heads, normalised per pair (arXiv 2410.05258)."""

    roles: ClassVar = dict.fromkeys(
        ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2", "norm_weight"), Role.VECTOR
    )
    float32_parameters: ClassVar = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")

    def __init__(self, config: ModelConfig, layer: LayerSpec) -> None:
        super().__init__()
        self.scale, self.window = config.attention_scale, layer.window
        self.dropout = 0.0  # of the probabilities, while training
        self.eps = config.norm_eps
        self.lambda_init = lambda_init(layer.index)
        self.lambda_q1 = nn.Parameter(torch.empty(config.head_dim))
        self.lambda_k1 = nn.Parameter(torch.empty(config.head_dim))
        self.lambda_q2 = nn.Parameter(torch.empty(config.head_dim))
        self.lambda_k2 = nn.Parameter(torch.empty(config.head_dim))
        self.norm_weight = nn.Parameter(torch.ones(2 * config.head_dim))

    def weight(self) -> Tensor:
        """The scalar lambda, float32."""
        first = torch.exp(torch.sum(own_part(self.lambda_q1) * own_part(self.lambda_k1)))
        second = torch.exp(torch.sum(own_part(self.lambda_q2) * own_part(self.lambda_k2)))
        return first - second + self.lambda_init

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, segments: Tensor | None
    ) -> Tensor:
        """(B, H, T, P) queries to (B, T, H * P): each pair fills the places of its two heads."""
        out = differential_attention(
            q,
            k,
            v,
            self.weight().to(v.dtype),
            scale=self.scale,
            window=self.window,
            starts_B=starts,
            segments_BT=segments,
            dropout=self.dropout if self.training else 0.0,
        )
        norm_weight = own_part(self.norm_weight).to(out.dtype)
        out = F.rms_norm(out, out.shape[-1:], norm_weight, self.eps)
        return (out * (1 - self.lambda_init)).transpose(1, 2).flatten(2)

    def decode_constants(self) -> dict[str, Tensor]:
        """The scalar lambda, `weight`, and the weight of the norm in float32, `norm_weight`."""
        return {"weight": self.weight(), "norm_weight": self.norm_weight.float()}

    def decode(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, constants: Mapping[str, Tensor]
    ) -> Tensor:
        """(B, H, P) queries to (B, H * P) for one token per slot."""
        return decode_differential_attention(
            q,
            k,
            v,
            lengths,
            constants["weight"],
            constants["norm_weight"],
            scale=self.scale,
            eps=self.eps,
            factor=1 - self.lambda_init,
        )


_MAPS = {
    AttentionVariant.SOFTMAX: SoftmaxMaps,
    AttentionVariant.DIFFERENTIAL: DifferentialMaps,
}


class CrossAttention(nn.Module):
    """Queries of its own against the keys and values an earlier layer published."""

    roles: ClassVar = {
        "q_proj.weight": Role.MATRIX,
        "q_proj.bias": Role.VECTOR,
        "out_proj.weight": Role.MATRIX,
        "out_proj.bias": Role.VECTOR,
    }

    def __init__(self, config: ModelConfig, layer: LayerSpec) -> None:
        super().__init__()
        D, size = config.hidden_size, config.attention_size
        self.head_dim = config.head_dim
        self.q_proj = Linear(D, size, bias=config.attention_bias)
        self.maps: SoftmaxMaps | DifferentialMaps = _MAPS[config.attention_variant](config, layer)
        self.position = make_position(config)
        self.out_proj = ResidualProjection(size, D, bias=config.attention_bias)

    def forward(
        self, x_BTD: Tensor, context: BatchContext, shared: SharedStates, state: LayerState | None
    ) -> tuple[Tensor, SharedStates]:
        """(B, T, D) to (B, T or keep, D)."""
        assert shared.keys is not None, "the pattern guarantees an earlier publisher"
        q_BHTP = self.queries(x_BTD, context)
        out = self.maps(q_BHTP, shared.keys, shared.values, context.starts, context.segments)
        return self.out_proj(out), shared

    def queries(self, x_BTD: Tensor, context: BatchContext) -> Tensor:
        """(B, H, T or keep, P), with positions."""
        q_BHTP = _heads(self.q_proj(context.select(x_BTD)), self.head_dim)
        return self.position(q_BHTP, context.narrowed())

    def decode_constants(self) -> dict[str, Tensor]:
        """Those of the maps and of the positions."""
        device = self.q_proj.weight.device
        return self.maps.decode_constants() | self.position.decode_constants(device)

    def decode(
        self, x_BD: Tensor, step: SlotStep, shared: SharedStates, layer: SlotLayer
    ) -> tuple[Tensor, SharedStates]:
        """(B, D) to (B, D) for one token per slot."""
        assert shared.keys is not None, "the pattern guarantees an earlier publisher"
        assert shared.values is not None, "they come together"
        q_BHP = self._decode_queries(x_BD, step, layer)
        out = self.maps.decode(q_BHP, shared.keys, shared.values, step.lengths_B, layer.constants)
        return few_rows(self.out_proj, out), shared

    def _decode_queries(self, x_BD: Tensor, step: SlotStep, layer: SlotLayer) -> Tensor:
        q_BHP = few_rows(self.q_proj, x_BD).unflatten(-1, (-1, self.head_dim))
        return self.position.decode(q_BHP, step, layer.constants)


class SelfAttention(CrossAttention):
    """Keys and values of its own, windowed or full; may publish them, or its heads as memory."""

    roles: ClassVar = CrossAttention.roles | {
        "kv_proj.weight": Role.MATRIX,
        "kv_proj.bias": Role.VECTOR,
    }
    halves: ClassVar = ("kv_proj.weight", "kv_proj.bias")

    def __init__(self, config: ModelConfig, layer: LayerSpec) -> None:
        super().__init__(config, layer)
        kv_size = 2 * config.num_kv_heads * config.head_dim
        self.kv_proj = Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.publishes_kv = layer.publishes_kv
        self.publishes_memory = layer.publishes_memory is MemorySource.ATTENTION

    def forward(
        self, x_BTD: Tensor, context: BatchContext, shared: SharedStates, state: KVState | None
    ) -> tuple[Tensor, SharedStates]:
        """(B, T, D) to (B, T or keep, D); stores the T new columns in `state` if there is one."""
        k_BKTP, v_BKTP = _heads(self.kv_proj(x_BTD), self.head_dim).chunk(2, dim=1)
        k_BKTP = self.position(k_BKTP, context)
        if state is None:
            k_BKSP, v_BKSP, starts = k_BKTP, v_BKTP, context.starts
        else:
            k_BKSP, v_BKSP, starts = state.append(k_BKTP, v_BKTP, context)
        if self.publishes_kv:
            shared = shared._replace(keys=k_BKSP, values=v_BKSP)
        q_BHTP = self.queries(x_BTD, context)
        out = self.maps(q_BHTP, k_BKSP, v_BKSP, starts, context.segments)
        if self.publishes_memory:
            shared = shared._replace(memory=out)
        return self.out_proj(out), shared

    def decode(
        self, x_BD: Tensor, step: SlotStep, shared: SharedStates, layer: SlotLayer
    ) -> tuple[Tensor, SharedStates]:
        """(B, D) to (B, D) for one token per slot, whose keys and values are stored."""
        assert isinstance(layer.state, KVState)
        heads = few_rows(self.kv_proj, x_BD).unflatten(-1, (-1, self.head_dim))
        k_BKP, v_BKP = heads.chunk(2, dim=1)
        k_BKSP, v_BKSP = layer.state.buffers["keys"], layer.state.buffers["values"]
        columns_B, lengths_B = layer.state.places(step)
        k_BKP = self.position.decode(k_BKP, step, layer.constants)
        store_columns(k_BKP, v_BKP, k_BKSP, v_BKSP, columns_B)
        if self.publishes_kv:
            shared = shared._replace(keys=k_BKSP, values=v_BKSP)
        q_BHP = self._decode_queries(x_BD, step, layer)
        out = self.maps.decode(q_BHP, k_BKSP, v_BKSP, lengths_B, layer.constants)
        if self.publishes_memory:
            shared = shared._replace(memory=out)
        return few_rows(self.out_proj, out), shared


def set_attention_dropout(model: nn.Module, *, self_decoder: float, cross_decoder: float) -> None:
    """Set the share of attention probabilities dropped while training, in all layers of a model.

    `self_decoder` is for layers with keys of their own, `cross_decoder` for those that read
    another layer's. Nothing is stored with the model: a fresh or loaded one drops nothing.
    """
    for module in model.modules():
        if isinstance(module, CrossAttention):
            own_keys = isinstance(module, SelfAttention)
            module.maps.dropout = self_decoder if own_keys else cross_decoder


def _heads(x_BTF: Tensor, head_dim: int) -> Tensor:
    """(B, T, heads * P) to (B, heads, T, P), without a copy."""
    return x_BTF.unflatten(-1, (-1, head_dim)).transpose(1, 2)
