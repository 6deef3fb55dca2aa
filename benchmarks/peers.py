"""The models every benchmark compares, all of about 20 million parameters.

Ours are presets at depth 8; the peers are transformers' Llama and Jamba (4 Mamba and 4 attention
layers, no experts), randomly initialised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sambay.errors import MissingPackage
from sambay.model import LanguageModel
from sambay.spec import ModelConfig, presets

VOCAB = 4096
WINDOW = 128
_SHAPE: dict[str, Any] = {"vocab_size": VOCAB, "num_heads": 8, "num_kv_heads": 2, "head_dim": 48}

Forward = Callable[[Tensor], Tensor]


def sambay_20m() -> ModelConfig:
    """SambaY, 4 groups deep, window 128."""
    return presets.build("sambay", 8, hidden_size=384, window=WINDOW, **_SHAPE)


def transformer_20m() -> ModelConfig:
    """Transformer++ of equal size."""
    return presets.build("transformer++", 8, hidden_size=400, **_SHAPE)


def ours(config: ModelConfig) -> tuple[nn.Module, Forward]:
    """One of our models and its map from ids (B, T) to logits (B, T, V)."""
    model = LanguageModel(config)
    return model, model


def llama() -> tuple[nn.Module, Forward]:
    """transformers' Llama of the size and shape of our Transformer++."""
    transformers = _transformers()
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=400,
        intermediate_size=1600,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=48,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    return model, lambda ids: model(input_ids=ids).logits


def jamba() -> tuple[nn.Module, Forward]:
    """transformers' Jamba of equal size, with its fallback scan for machines without kernels."""
    transformers = _transformers()
    config = transformers.JambaConfig(
        vocab_size=VOCAB,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=1,
        num_experts_per_tok=1,
        use_mamba_kernels=False,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = transformers.JambaForCausalLM(config)
    return model, lambda ids: model(input_ids=ids).logits


def parameters(model: nn.Module) -> int:
    """The number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def training_step(model: nn.Module, forward: Forward, ids: Tensor) -> Callable[[], None]:
    """One step of AdamW on next-token cross-entropy over ids (B, T + 1)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        logits = forward(ids[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _transformers():
    try:
        import transformers
    except ImportError:
        raise MissingPackage("transformers", "comparing with Llama and Jamba", "bench") from None
    return transformers
