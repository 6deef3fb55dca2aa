"""What a model is: pattern, layers, configuration, presets, footprint. Imports no torch."""

from sambay.spec.layers import LayerKind, LayerSpec, MemorySource, prefill_split
from sambay.spec.model_config import AttentionVariant, ModelConfig, Norm, Position
from sambay.spec.parametrization import InitScheme, Parametrization
from sambay.spec.pattern import format_pattern, parse_pattern
from sambay.spec.recurrent import GatedMemory, RecurrentKind, RecurrentNorm

__all__ = [
    "AttentionVariant",
    "GatedMemory",
    "InitScheme",
    "LayerKind",
    "LayerSpec",
    "MemorySource",
    "ModelConfig",
    "Norm",
    "Parametrization",
    "Position",
    "RecurrentKind",
    "RecurrentNorm",
    "format_pattern",
    "parse_pattern",
    "prefill_split",
]
