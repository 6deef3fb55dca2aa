"""How transformers loads and saves the official tensor names: the key map in its own terms.

`sambay.hf.key_map` is the truth; a test holds this file to it in both directions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

_RENAMED = {
    "model.embed_tokens": "model.embedding",
    "model.final_layernorm": "model.norm",
    "model.layers": "model.blocks",
    "input_layernorm": "mixer_norm",
    "post_attention_layernorm": "mlp_norm",
    "mlp.fc1": "mlp.in_proj",
    "mlp.fc2": "mlp.out_proj",
    "attn.in_proj": "mixer.in_proj",
    "attn.x_proj": "mixer.x_proj",
    "attn.dt_proj.weight": "mixer.dt_proj.weight",
    "attn.out_proj": "mixer.out_proj",
    "attn.conv1d.bias": "mixer.conv_bias",
    "attn.A_log": "mixer.A_log",
    "attn.inner_cross_attn.lambda_": "mixer.maps.lambda_",
    "attn.inner_cross_attn.subln.weight": "mixer.maps.norm_weight",
}


def register_official_names(model_type: str) -> None:
    """Let checkpoints of `model_type` be read and written under the official names."""
    register_checkpoint_conversion_mapping(
        model_type,
        [
            *(WeightRenaming(official, ours) for official, ours in _RENAMED.items()),
            _QuantisableSplit("attn.Wqkv", ["mixer.q_proj", "mixer.kv_proj"], [_SplitQueries()]),
            WeightConverter("attn.conv1d.weight", "mixer.conv_weight", [_DropMiddle()]),
            WeightConverter("attn.D", "mixer.D", [_Widen()]),
            WeightConverter("attn.dt_proj.bias", "mixer.dt_bias", [_Widen()]),
        ],
        overwrite=True,
    )


def _single(tensors: dict[str, Any]) -> Tensor:
    (value,) = tensors.values()
    return value[0] if isinstance(value, list) else value


class _QuantisableSplit(WeightConverter):
    """Quantisation while loading takes one tensor and drops the others: give it one at a time."""

    __slots__ = ()

    def convert(self, layer_name: str, hf_quantizer: Any = None, **kwargs: Any) -> dict[str, Any]:
        tensors = super().convert(layer_name, hf_quantizer=None, **kwargs)
        if hf_quantizer is None or self.quantization_operation is None:
            return tensors
        info = kwargs.get("loading_info")
        converted: dict[str, Any] = {}
        for name, tensor in tensors.items():
            converted |= self.quantization_operation.convert(
                {name: tensor},
                source_patterns=self.source_patterns,
                target_patterns=self.target_patterns,
                full_layer_name=name,
                model=kwargs.get("model"),
                config=kwargs.get("config"),
                missing_keys=info.missing_keys if info else None,
            )
        return converted


class _SplitQueries(ConversionOps):
    """Rows of queries, then of keys and values; a cross-attention layer has only the first."""

    @torch.no_grad()
    def convert(
        self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any
    ) -> dict[str, Any]:
        fused = _single(input_dict)
        size = kwargs["config"].model_config().attention_size
        parts = (fused[:size], fused[size:])
        return {
            name: part.contiguous()
            for name, part in zip(target_patterns, parts, strict=True)
            if len(part)
        }

    @property
    def reverse_op(self) -> ConversionOps:
        return _JoinQueries()


class _JoinQueries(ConversionOps):
    @torch.no_grad()
    def convert(
        self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any
    ) -> dict[str, Any]:
        parts = [input_dict[name] for name in source_patterns if name in input_dict]
        parts = [part[0] if isinstance(part, list) else part for part in parts]
        return {target_patterns[0]: torch.cat(parts)}

    @property
    def reverse_op(self) -> ConversionOps:
        return _SplitQueries()


class _DropMiddle(ConversionOps):
    """(E, 1, W) to (E, W)."""

    def convert(
        self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any
    ) -> dict[str, Any]:
        return {target_patterns[0]: _single(input_dict).squeeze(1)}

    @property
    def reverse_op(self) -> ConversionOps:
        return _AddMiddle()


class _AddMiddle(ConversionOps):
    def convert(
        self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any
    ) -> dict[str, Any]:
        return {target_patterns[0]: _single(input_dict).unsqueeze(1)}

    @property
    def reverse_op(self) -> ConversionOps:
        return _DropMiddle()


class _Widen(ConversionOps):
    """Stored in the model's dtype, kept in float32."""

    def convert(
        self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any
    ) -> dict[str, Any]:
        return {target_patterns[0]: _single(input_dict)}

    @property
    def reverse_op(self) -> ConversionOps:
        return _Narrow()


class _Narrow(ConversionOps):
    def convert(
        self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any
    ) -> dict[str, Any]:
        return {target_patterns[0]: _single(input_dict).to(kwargs["model"].dtype)}

    @property
    def reverse_op(self) -> ConversionOps:
        return _Widen()
