"""The tensors of the official Phi4Flash checkpoints and what they are called here; a table.

Source: the tensor index of microsoft/Phi-4-mini-flash-reasoning (434 names).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sambay.spec import AttentionVariant, LayerKind, ModelConfig, Norm

LAYER = "model.layers.{}."
BLOCK = "blocks.{}."


class Rule(NamedTuple):
    """One tensor of a layer: its official name below `model.layers.i`, and ours below `blocks.i`.

    Several names of ours are consecutive groups of rows of the official tensor.
    """

    official: str
    ours: tuple[str, ...]
    float32: bool = False  # stored in float32 whatever the rest is stored in
    channel_dim: bool = False  # (E, 1, W) there, (E, W) here

    def shape(self, *ours: Sequence[int]) -> tuple[int, ...]:
        """The official shape, from the shapes of our tensors."""
        rest = ours[0][1:]
        rows = sum(shape[0] for shape in ours)
        return (rows, 1, *rest) if self.channel_dim else (rows, *rest)


def _norm(official: str, ours: str) -> tuple[Rule, ...]:
    return tuple(Rule(f"{official}.{part}", (f"{ours}.{part}",)) for part in ("weight", "bias"))


def _rows(official: str, *ours: str) -> tuple[Rule, ...]:
    return tuple(
        Rule(f"attn.{official}.{part}", tuple(f"mixer.{name}.{part}" for name in ours))
        for part in ("weight", "bias")
    )


EVERY_LAYER = (
    *_norm("input_layernorm", "mixer_norm"),
    *_norm("post_attention_layernorm", "mlp_norm"),
    Rule("mlp.fc1.weight", ("mlp.in_proj.weight",)),
    Rule("mlp.fc2.weight", ("mlp.out_proj.weight",)),
)
_MAMBA = (
    Rule("attn.in_proj.weight", ("mixer.in_proj.weight",)),
    Rule("attn.conv1d.weight", ("mixer.conv_weight",), channel_dim=True),
    Rule("attn.conv1d.bias", ("mixer.conv_bias",)),
    Rule("attn.x_proj.weight", ("mixer.x_proj.weight",)),
    Rule("attn.dt_proj.weight", ("mixer.dt_proj.weight",)),
    Rule("attn.dt_proj.bias", ("mixer.dt_bias",)),
    Rule("attn.A_log", ("mixer.A_log",), float32=True),
    Rule("attn.D", ("mixer.D",)),
    Rule("attn.out_proj.weight", ("mixer.out_proj.weight",)),
)
_MAPS = (
    *(
        Rule(f"attn.inner_cross_attn.lambda_{name}", (f"mixer.maps.lambda_{name}",), float32=True)
        for name in ("q1", "k1", "q2", "k2")
    ),
    Rule("attn.inner_cross_attn.subln.weight", ("mixer.maps.norm_weight",)),
)
_SELF_ATTENTION = (*_rows("Wqkv", "q_proj", "kv_proj"), *_rows("out_proj", "out_proj"), *_MAPS)
_CROSS_ATTENTION = (*_rows("Wqkv", "q_proj"), *_rows("out_proj", "out_proj"), *_MAPS)
_GATED_MEMORY = (
    Rule("attn.in_proj.weight", ("mixer.in_proj.weight",)),
    Rule("attn.out_proj.weight", ("mixer.out_proj.weight",)),
)
MIXER_RULES: dict[LayerKind, tuple[Rule, ...]] = {
    LayerKind.MAMBA: _MAMBA,
    LayerKind.SLIDING: _SELF_ATTENTION,
    LayerKind.FULL: _SELF_ATTENTION,
    LayerKind.GATED_MEMORY: _GATED_MEMORY,
    LayerKind.CROSS: _CROSS_ATTENTION,
}
OUTER = (
    Rule("model.embed_tokens.weight", ("embedding.weight",)),
    Rule("model.final_layernorm.weight", ("norm.weight",)),
    Rule("model.final_layernorm.bias", ("norm.bias",)),
)
HEAD = Rule("lm_head.weight", ("head.weight",))  # present only where embeddings are not tied


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """All tensors of an official checkpoint of this configuration, with full names on both sides.

    The configuration must be one that the official class can express: LayerNorm, differential
    attention with biases, memory from Mamba (see `official.describe`).
    """
    assert config.norm is Norm.LAYER, "checked by the caller"
    assert config.attention_bias, "checked by the caller"
    assert config.attention_variant is AttentionVariant.DIFFERENTIAL, "checked by the caller"
    layers = [
        rule._replace(
            official=LAYER.format(layer.index) + rule.official,
            ours=tuple(BLOCK.format(layer.index) + name for name in rule.ours),
        )
        for layer in config.layers
        for rule in (*EVERY_LAYER, *MIXER_RULES[layer.kind])
    ]
    return (*OUTER, *layers, *(() if config.tie_embeddings else (HEAD,)))


def to_ours(rule: Rule, tensor: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
    """Our tensors of an official one, in the order of `rule.ours`; views of it."""
    if rule.channel_dim:
        return (tensor.squeeze(1),)
    if len(rule.ours) == 1:
        return (tensor,)
    queries = config.attention_size
    return tensor[:queries], tensor[queries:]


def to_official(rule: Rule, tensors: Sequence[Tensor]) -> Tensor:
    """The official tensor of ours, given in the order of `rule.ours`; a view where there is one."""
    if rule.channel_dim:
        return tensors[0].unsqueeze(1)
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))


def own_shapes(official: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of a file with official names under our names, whatever its configuration.

    Enough to tell what the file holds: rows of a joint projection beyond its columns are taken for
    keys and values.
    """
    outer = {rule.official: rule.ours[0] for rule in (*OUTER, HEAD)}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in official.items():
        name = outer.get(name, name).replace("model.layers.", "blocks.")
        name = name.replace(".attn.", ".mixer.").replace("conv1d.weight", "conv_weight")
        name = name.replace(".mlp.fc2.", ".mlp.out_proj.")
        joint = name.replace(".Wqkv.", ".q_proj.")
        if joint != name and len(shape) == 2 and shape[0] > shape[1]:
            shapes[name.replace(".Wqkv.", ".kv_proj.")] = (shape[0] - shape[1], shape[1])
        shapes[joint] = shape
    return shapes
