"""Moving a model's multipliers into its weights, for formats that have no place for them."""

from __future__ import annotations

import math

import torch

from sambay.model import LanguageModel
from sambay.spec import LayerKind, ModelConfig

_WITH_QUERIES = (LayerKind.SLIDING, LayerKind.FULL, LayerKind.CROSS)


def folded_config(config: ModelConfig) -> ModelConfig:
    """The configuration that `fold_multipliers` gives; the argument itself if all are 1 already."""
    usual = 1 / math.sqrt(config.head_dim)
    if math.isclose(config.attention_scale, usual, rel_tol=1e-12):
        usual = config.attention_scale
    return config.replace(
        residual_multiplier=1.0,
        logit_multiplier=1.0,
        embedding_multiplier=1.0,
        attention_scale=usual,
    )


@torch.no_grad()
def fold_multipliers(model: LanguageModel) -> LanguageModel:
    """A model with the same logits whose multipliers are 1 and whose attention scale is usual.

    Every matrix (and bias) that writes to the residual stream takes the residual multiplier, the
    final norm the logit multiplier, the queries what the attention scale differs from
    1 / sqrt(head_dim). The embedding takes its own multiplier, and where it is also the head the
    final norm gives that back. Tensors that do not change are shared with `model`.
    """
    config, target = model.config, folded_config(model.config)
    residual, final = config.residual_multiplier, config.logit_multiplier
    factors: dict[str, float] = {"embedding.weight": config.embedding_multiplier}
    if config.tie_embeddings:
        final /= config.embedding_multiplier
    queries = config.attention_scale / target.attention_scale
    for part in ("weight", "bias"):
        factors[f"norm.{part}"] = final
        for layer in config.layers:
            block = f"blocks.{layer.index}."
            factors[f"{block}mixer.out_proj.{part}"] = residual
            factors[f"{block}mlp.out_proj.{part}"] = residual
            if layer.kind in _WITH_QUERIES:
                factors[f"{block}mixer.q_proj.{part}"] = queries
    with torch.device("meta"):
        folded = LanguageModel(target)
    values = {}
    for name, tensor in model.state_dict().items():
        factor = factors.get(name, 1.0)
        values[name] = tensor if factor == 1.0 else tensor * factor
    folded.load_state_dict(values, assign=True)
    if config.tie_embeddings:
        folded.head.weight = folded.embedding.weight
    return folded.train(model.training)
