"""Attention on vLLM's paged keys and values: windowed, full, and cross-attention.

Shape letters: T tokens of all requests, D hidden, P head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sambay.errors import MissingPackage
from sambay.layers.attention import DifferentialMaps
from sambay.serve.heads import plan_heads
from sambay.serve.platform import attention_head_sizes
from sambay.spec import AttentionVariant, LayerKind, LayerSpec, MemorySource, ModelConfig

try:
    from vllm.config import VllmConfig
    from vllm.distributed import get_tensor_model_parallel_world_size
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.linear import (
        ColumnParallelLinear,
        MergedColumnParallelLinear,
        RowParallelLinear,
    )
except ModuleNotFoundError as error:
    raise MissingPackage("vllm", "serving", "vllm") from error


class Angles(NamedTuple):
    """Cosines and sines of the rotation of each token, (T, 1, P / 2), float32."""

    cos: Tensor
    sin: Tensor


def make_angles(positions_T: Tensor, theta: float, head_dim: int) -> Angles:
    """The angles of rotary positions; those of `sambay.layers.rope`."""
    half = torch.arange(head_dim // 2, device=positions_T.device, dtype=torch.float32)
    rates = theta ** (-2 * half / head_dim)
    angles = positions_T[:, None, None].float() * rates
    return Angles(angles.cos(), angles.sin())


def rotate(x: Tensor, angles: Angles, head_dim: int) -> Tensor:
    """(T, heads * P) with the halves of each head rotated, in the same dtype."""
    heads = x.view(x.shape[0], -1, head_dim)
    first, second = heads.float().chunk(2, dim=-1)
    cos, sin = angles
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype).flatten(1)


class Difference(DifferentialMaps):
    """The difference of both maps of each pair, from one attention over heads of twice the size."""

    def __init__(self, config: ModelConfig, layer: LayerSpec) -> None:
        super().__init__(config, layer)
        # A scalar of the weights alone, so it is not computed again for each token.
        self.ready_weight: Tensor
        self.register_buffer("ready_weight", torch.tensor(self.lambda_init), persistent=False)

    def finish_loading(self) -> None:
        """Compute what depends on the weights alone."""
        self.ready_weight.copy_(self.weight())

    def combine(self, out: Tensor) -> Tensor:
        """(T, pairs * 2, 2 P) to (T, pairs * 2 P)."""
        first, second = out.unflatten(1, (-1, 2)).unbind(2)
        out = first - self.ready_weight.to(out.dtype) * second
        out = F.rms_norm(out, out.shape[-1:], self.norm_weight.to(out.dtype), self.eps)
        return (out * (1 - self.lambda_init)).flatten(1)


class ServedAttention(nn.Module):
    """Queries of its own; keys and values of its own, or those of the layer `kv_from`."""

    def __init__(
        self, config: ModelConfig, layer: LayerSpec, vllm_config: VllmConfig, prefix: str
    ) -> None:
        super().__init__()
        processes = get_tensor_model_parallel_world_size()
        self.plan = plan = plan_heads(config, processes, attention_head_sizes())
        D, bias = config.hidden_size, config.attention_bias
        self.head_dim = config.head_dim
        self.q_proj = ColumnParallelLinear(
            D, config.attention_size, bias=bias, prefix=f"{prefix}.q_proj"
        )
        self.kv_proj = None
        target = None
        if layer.kind is LayerKind.CROSS:
            # The names of layers differ in nothing but their number.
            mine, target_index = f"blocks.{layer.index}.", f"blocks.{layer.kv_from}."
            target = f"{prefix}.attn".replace(mine, target_index)
        else:
            size = plan.total_keys * plan.unit_size
            self.kv_proj = MergedColumnParallelLinear(
                D, [size, size], bias=bias, prefix=f"{prefix}.kv_proj"
            )
        self.maps = None
        if config.attention_variant is AttentionVariant.DIFFERENTIAL:
            self.maps = Difference(config, layer)
        self.out_proj = RowParallelLinear(
            config.attention_size, D, bias=bias, prefix=f"{prefix}.out_proj"
        )
        self.attn = Attention(
            plan.queries,
            plan.size,
            config.attention_scale,
            num_kv_heads=plan.keys,
            cache_config=vllm_config.cache_config,
            per_layer_sliding_window=layer.window,
            prefix=f"{prefix}.attn",
            kv_sharing_target_layer_name=target,
        )
        self.publishes_memory = layer.publishes_memory is MemorySource.ATTENTION

    def forward(self, x_TD: Tensor, angles: Angles | None) -> tuple[Tensor, Tensor | None]:
        """(T, D) to (T, D) and the heads before the output projection, if they are the memory."""
        q = self.q_proj(x_TD)[0]
        if angles is not None:
            q = rotate(q, angles, self.head_dim)
        q = self.plan.widen_queries(q)
        if self.kv_proj is None:
            # vLLM wants tensors here, and neither reads nor stores them: the cache is shared.
            k = v = q.new_empty(q.shape[0], self.plan.keys * self.plan.size)
        else:
            k, v = self.kv_proj(x_TD)[0].chunk(2, dim=-1)
            if angles is not None:
                k = rotate(k.contiguous(), angles, self.head_dim)
            k, v = self.plan.widen_keys(k), self.plan.widen_keys(v)
        out = self.plan.narrow(self.attn(q, k, v))
        heads = out.flatten(1) if self.maps is None else self.maps.combine(out)
        return self.out_proj(heads.contiguous())[0], heads if self.publishes_memory else None


def finish_loading(model: nn.Module) -> None:
    """Compute in all layers what depends on the weights alone."""
    for module in model.modules():
        if isinstance(module, Difference):
            module.finish_loading()
