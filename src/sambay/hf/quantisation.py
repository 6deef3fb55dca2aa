"""Weights of 8 and 4 bits by torchao: which matrices may be replaced, and replacing them.

Kept as they are: the head, which is the embedding in tied models (quantised on its own it would be
a second copy); and what computes B, C and the time steps of a Mamba layer: 0.4 % of the weights of
Phi-4-mini-flash, so little to gain, on which all of a state depends; and its rows of 160 are no
whole number of the usual groups. The same holds for decay and beta of Gated DeltaNet, a row per
head; Mamba-2 computes all with one matrix, which is not split for them. Parameters that are no
matrices of a linear layer are never touched by torchao.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from sambay.errors import ConfigError, MissingPackage
from sambay.hf.lora import TARGETS, HasModelConfig, kinds_of, target_modules
from sambay.spec import ModelConfig

HEAD = "lm_head"
WEIGHTS = ("int8", "int4")
GROUP_SIZE = 32
"""Weights of 4 bits that share a scale; kernels of this package read groups of whole multiples."""

_KEPT = ("mamba.x_proj", "mamba.dt_proj", "gated_delta.a_proj", "gated_delta.b_proj")

M = TypeVar("M", bound=nn.Module)


def quantise(model: M, weights: str, *, group_size: int = GROUP_SIZE) -> M:
    """The model itself, the matrices of its layers replaced by integers with scales.

    On a CPU decode steps then read them at the speed of memory (`sambay.layers.quantised`);
    anything else that multiplies by them is done by torchao, in the dtype they had.

    model: a `LanguageModel`, or one of the classes of transformers for it.
    weights: "int8" with a scale for each row, or "int4" with one for each group.
    group_size: for "int4"; layers whose rows it does not divide stay as they are.

    Raises:
        ConfigError: other weights, a group size that is no multiple of 32 or divides no row of the
            model, or a model that is quantised already.
        MissingPackage: torchao is not installed.
    """
    if weights not in WEIGHTS:
        raise ConfigError(f"weights = {weights!r} is unknown; use {' or '.join(WEIGHTS)}")
    if group_size < 1 or group_size % GROUP_SIZE:
        raise ConfigError(f"group_size = {group_size} is no multiple of {GROUP_SIZE}; use 32 or 64")
    require_torchao()
    quantization = _torchao()
    config: Any = model.config
    quantises = filter_fn(config, group_size if weights == "int4" else None)
    for name, module in model.named_modules():
        if quantises(module, name) and type(module.weight) is not nn.Parameter:
            kind = type(module.weight).__name__
            raise ConfigError(f"{name} holds {kind} already; quantise a model that is not")
    how: Any = quantization.Int8WeightOnlyConfig()
    if weights == "int4":
        group, dtype = quantization.PerGroup(group_size), getattr(torch, weights)
        how = quantization.IntxWeightOnlyConfig(weight_dtype=dtype, granularity=group)
    quantization.quantize_(model, how, filter_fn=quantises)
    return model


def _torchao() -> Any:
    """torchao's quantisation, imported without its warnings of what it has for GPUs only."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        from torchao import quantization
    finally:
        logging.disable(before)
    return quantization


def require_torchao() -> None:
    """Make sure that weights can be quantised, before the time it takes to load them.

    Raises:
        MissingPackage: torchao is not installed.
    """
    if importlib.util.find_spec("torchao") is None:
        raise MissingPackage("torchao", "quantising weights", "finetune")


def modules_to_not_convert(
    config: ModelConfig | HasModelConfig, group_size: int | None = None
) -> list[str]:
    """For `TorchAoConfig(..., modules_to_not_convert=...)`: patterns of what stays as it is.

    config: `AutoConfig.from_pretrained(folder)`, or that of the model.
    group_size: how many weights of a row share a scale; layers whose rows it does not divide are
        kept too, instead of failing. None for one scale per row.

    Raises:
        ConfigError: the group size divides no row of this model.
    """
    return [HEAD, *_patterns(config, group_size)]


def filter_fn(
    config: ModelConfig | HasModelConfig, group_size: int | None = None
) -> Callable[[nn.Module, str], bool]:
    """For `torchao.quantization.quantize_(model, ..., filter_fn=...)`: the same choice.

    Raises:
        ConfigError: the group size divides no row of this model.
    """
    kept = [re.compile(pattern) for pattern in _patterns(config, group_size)]

    def quantises(module: nn.Module, name: str) -> bool:
        inner = "blocks." in name and isinstance(module, nn.Linear)
        return inner and not any(pattern.fullmatch(name) for pattern in kept)

    return quantises


def _patterns(config: ModelConfig | HasModelConfig, group_size: int | None) -> list[str]:
    architecture = config if isinstance(config, ModelConfig) else config.model_config()
    widths = _row_widths(architecture)
    kept = [name for name in widths if name in _KEPT]
    if group_size is not None:
        kept += [name for name, width in widths.items() if name not in kept and width % group_size]
    if len(kept) == len(widths):
        rows = ", ".join(map(str, sorted(set(widths.values()))))
        raise ConfigError(
            f"group_size = {group_size} divides no row to quantise (rows of {rows} weights); "
            "choose a size that does, such as 32, or int8 with one scale per row"
        )
    return [target_modules(architecture, kept)] if kept else []


def _row_widths(config: ModelConfig) -> dict[str, int]:
    """The input width of every linear layer the model has, under "kind.module"."""
    D, inner = config.hidden_size, config.d_inner
    special = {
        "mamba.x_proj": inner,
        "mamba.dt_proj": config.dt_rank,
        "mamba.out_proj": inner,
        "mamba2.out_proj": inner,
        "gated_delta.out_proj": inner,
        "attention.out_proj": config.attention_size,
        "cross_attention.out_proj": config.attention_size,
        "gated_memory.out_proj": config.memory_size,
        "mlp.out_proj": config.intermediate_size,
    }
    return {
        f"{kind}.{module}": special.get(f"{kind}.{module}", D)
        for kind in kinds_of(config)
        for module in TARGETS[kind]
    }
