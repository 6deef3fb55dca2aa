"""The stack of blocks as vLLM runs it: as a whole, or the cross-decoder on fewer tokens.

Shape letters: T tokens of all requests, D hidden.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from sambay.errors import MissingPackage
from sambay.layers.norm import make_norm
from sambay.serve.attention import Angles, ServedAttention, make_angles
from sambay.serve.layers import ServedGatedMemoryUnit, ServedMLP
from sambay.serve.mamba import ServedMamba
from sambay.serve.recurrence import HostedRecurrence
from sambay.spec import LayerKind, LayerSpec, ModelConfig, Position, RecurrentKind, prefill_split

try:
    from vllm.compilation.backends import set_model_tag
    from vllm.compilation.decorators import support_torch_compile
    from vllm.config import VllmConfig
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.sequence import IntermediateTensors
    from vllm.v1.attention.backends.utils import KVSharingFastPrefillMetadata
except ModuleNotFoundError as error:
    raise MissingPackage("vllm", "serving", "vllm") from error


class ServedBlock(nn.Module):
    """x + rm * mixer(norm(x)), then x + rm * mlp(norm(x)), on a float32 residual stream."""

    def __init__(
        self, config: ModelConfig, layer: LayerSpec, vllm_config: VllmConfig, prefix: str
    ) -> None:
        super().__init__()
        self.mixer_norm = make_norm(config)
        self.reads_memory = layer.kind is LayerKind.GATED_MEMORY
        self.mixer = _mixer(config, layer, vllm_config, f"{prefix}.mixer")
        self.mlp_norm = make_norm(config)
        self.mlp = ServedMLP(config, layer, f"{prefix}.mlp")
        self.residual_multiplier = config.residual_multiplier

    def forward(
        self, x_TD: Tensor, memory: Tensor | None, angles: Angles | None
    ) -> tuple[Tensor, Tensor | None]:
        """(T, D) float32 to the same, and the memory from here on."""
        if self.reads_memory:
            y = self.mixer(self.mixer_norm(x_TD), memory)
        else:
            y, published = self.mixer(self.mixer_norm(x_TD), angles)
            memory = memory if published is None else published
        x_TD = torch.add(x_TD, y, alpha=self.residual_multiplier)
        y, published = self.mlp(self.mlp_norm(x_TD))
        memory = memory if published is None else published
        return torch.add(x_TD, y, alpha=self.residual_multiplier), memory


def _mixer(config: ModelConfig, layer: LayerSpec, vllm_config: VllmConfig, name: str) -> nn.Module:
    if layer.kind is LayerKind.GATED_MEMORY:
        return ServedGatedMemoryUnit(config, name)
    if layer.kind is LayerKind.MAMBA:
        own = config.recurrent_kind is RecurrentKind.MAMBA
        return (ServedMamba if own else HostedRecurrence)(config, layer, vllm_config, name)
    return ServedAttention(config, layer, vllm_config, name)


def _fast(vllm_config: VllmConfig) -> bool:
    return vllm_config.cache_config.kv_sharing_fast_prefill


def _whole(vllm_config: VllmConfig) -> bool:
    return not _fast(vllm_config)


class _Part(nn.Module):
    """Some blocks of a model, which keeps them; here they have no names of their own."""

    def __init__(self, config: ModelConfig, blocks: list[ServedBlock]) -> None:
        super().__init__()
        self.parts = blocks  # a plain list: no parameters of this module
        self.theta = config.rope_theta if config.position is Position.ROPE else None
        self.head_dim = config.head_dim

    def run(
        self, x_TD: Tensor, memory: Tensor | None, positions: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        angles = None
        if self.theta is not None:
            angles = make_angles(positions, self.theta, self.head_dim)
        for block in self.parts:
            x_TD, memory = block(x_TD, memory, angles)
        return x_TD, memory


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": 0, "inputs_embeds": 0}, enable_if=_fast
)
class SelfDecoder(_Part):
    """The blocks up to the last one that keeps state; they see every token."""

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        prefix: str = "",
        blocks: list[ServedBlock],
        embed: nn.Module,
    ) -> None:
        config = vllm_config.model_config.hf_config.model_config()
        super().__init__(config, blocks)
        self.tables = [embed]  # hidden from the names of parameters, as the blocks are
        self.multiplier = config.embedding_multiplier

    def embed(self, input_ids: Tensor) -> Tensor:
        """(T,) to (T, D) in the dtype of the weights."""
        return self.tables[0](input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed(input_ids)
        return self.run(inputs_embeds.float() * self.multiplier, None, positions)


@support_torch_compile(dynamic_arg_dims={"hidden": 0, "memory": 0, "positions": 0}, enable_if=_fast)
class CrossDecoder(_Part):
    """The blocks behind it; only the tokens whose logits are wanted need them."""

    def __init__(
        self, *, vllm_config: VllmConfig, prefix: str = "", blocks: list[ServedBlock]
    ) -> None:
        super().__init__(vllm_config.model_config.hf_config.model_config(), blocks)

    def forward(
        self, hidden: torch.Tensor, memory: torch.Tensor | None, positions: torch.Tensor
    ) -> torch.Tensor:
        return self.run(hidden, memory, positions)[0]


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": 0, "inputs_embeds": 0}, enable_if=_whole
)
class ServedModel(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config.model_config()
        self.embedding = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.embedding"
        )
        self.blocks = nn.ModuleList(
            ServedBlock(config, layer, vllm_config, f"{prefix}.blocks.{layer.index}")
            for layer in config.layers
        )
        self.norm = make_norm(config)
        split = prefill_split(config.layers) + 1
        blocks: list[Any] = list(self.blocks)
        with set_model_tag("self_decoder"):
            self.self_decoder = SelfDecoder(
                vllm_config=vllm_config, blocks=blocks[:split], embed=self.embedding
            )
        with set_model_tag("cross_decoder"):
            self.cross_decoder = CrossDecoder(vllm_config=vllm_config, blocks=blocks[split:])
        self.fast_prefill = _fast(vllm_config)
        # All cross-attention layers are told the same.
        crosses = [layer.index for layer in config.layers if layer.kind is LayerKind.CROSS]
        self.crossing = f"{prefix}.blocks.{crosses[-1]}.mixer.attn" if crosses else ""
        if self.fast_prefill:
            self._allocate(vllm_config)

    def _allocate(self, vllm_config: VllmConfig) -> None:
        """Memory that stays in its place, as captured graphs need."""
        assert self.crossing, "refused when the configuration was checked"
        most = vllm_config.scheduler_config.max_num_batched_tokens
        like = self.embedding.weight
        width = self._memory_width()
        self.kept_hidden = like.new_zeros(most, self.config.hidden_size, dtype=torch.float32)
        self.kept_memory = like.new_zeros(most, width) if width else None
        self.kept_positions = torch.zeros(most, dtype=torch.int64, device=like.device)

    def _memory_width(self) -> int:
        """The part of the memory that this process has; 0 where nobody reads one."""
        for block in self.cross_decoder.parts:
            if isinstance(block.mixer, ServedGatedMemoryUnit):
                return block.mixer.in_proj.output_size_per_partition
        return 0

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(T, D), normed and multiplied: what the head reads."""
        if self.fast_prefill:
            x = self._forward_fast(input_ids, positions, inputs_embeds)
        else:
            x, memory = self.self_decoder(input_ids, positions, inputs_embeds)
            x = self.cross_decoder(x, memory, positions)
        return self.norm(x) * self.config.logit_multiplier

    def _forward_fast(
        self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None
    ) -> Tensor:
        """The cross-decoder on the tokens whose logits are wanted (linear prefill)."""
        x, memory = self.self_decoder(input_ids, positions, inputs_embeds)
        wanted, number = self._wanted()
        if wanted is None:
            wanted = torch.arange(x.shape[0], device=x.device)
        count = wanted.shape[0]
        self.kept_hidden[:count].copy_(x[wanted])
        self.kept_positions[:count].copy_(positions[wanted])
        kept_memory = None
        if self.kept_memory is not None:
            assert memory is not None
            self.kept_memory[:count].copy_(memory[wanted])
            kept_memory = self.kept_memory[:count]
        context = get_forward_context()
        batch = context.batch_descriptor
        if batch is not None:  # which captured graph fits
            context.batch_descriptor = dataclasses.replace(batch, num_tokens=count)
        y = self.cross_decoder(self.kept_hidden[:count], kept_memory, self.kept_positions[:count])
        context.batch_descriptor = batch
        if number is None:
            return y
        # Compiled code may hand out memory that it uses again.
        x = x.clone()
        x[wanted[:number]] = y[:number]
        return x

    def _wanted(self) -> tuple[Tensor | None, int | None]:
        """The tokens whose logits are wanted, padded, and how many they are; None for all."""
        metadata = get_forward_context().attn_metadata
        if not isinstance(metadata, dict):
            return None, None
        rows = metadata.get(self.crossing)
        if rows is None or not isinstance(rows, KVSharingFastPrefillMetadata):
            return None, None
        return rows.logits_indices_padded, rows.num_logits_indices
