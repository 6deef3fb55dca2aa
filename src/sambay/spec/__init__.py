"""What a model is: pattern, layers, configuration, presets, footprint. Imports no torch."""

from sambay.spec.layers import LayerKind, LayerSpec, MemorySource, prefill_split
from sambay.spec.model_config import AttentionVariant, ModelConfig, Norm, Position
from sambay.spec.parametrization import InitScheme, Parametrization
from sambay.spec.pattern import format_pattern, parse_pattern

__all__ = [
    "AttentionVariant",
    "InitScheme",
    "LayerKind",
    "LayerSpec",
    "MemorySource",
    "ModelConfig",
    "Norm",
    "Parametrization",
    "Position",
    "format_pattern",
    "parse_pattern",
    "prefill_split",
]
