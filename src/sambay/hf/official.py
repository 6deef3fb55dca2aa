"""Official Phi4Flash folders, as they are, to and from `LanguageModel`.

The configuration is in `sambay.hf.official_config`, the tensor names are in `sambay.hf.key_map`.
Stored are A_log and the lambdas in float32 and all else, D included, in the dtype of the model;
in memory everything that touches the recurrent state is float32. Widening and narrowing are exact
opposites, so what was loaded is written back byte for byte.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sambay.errors import CheckpointMismatch, ConfigError
from sambay.files import write_json
from sambay.hf import key_map
from sambay.hf.key_map import Rule
from sambay.hf.official_config import (
    ARCHITECTURE,
    MODEL_TYPE,
    describe,
    extend,
    other_model_type,
    parse,
)
from sambay.model import LanguageModel
from sambay.model.fit import explain_misfit
from sambay.model.folder import (
    CONFIG_FILE,
    TOKENIZER_FILES,
    allocate,
    materialise,
    meta_model,
    read_json_object,
    refuse_foreign_folder,
    stored_tensors,
)
from sambay.model.publish import publish_folder
from sambay.model.weights import Weights, open_folder
from sambay.model.weights_writer import DEFAULT_SHARD_BYTES, TensorPlan, write_folder
from sambay.spec import ModelConfig

__all__ = [
    "ARCHITECTURE",
    "MODEL_TYPE",
    "describe",
    "load",
    "other_model_type",
    "parse",
    "plan_tensors",
    "read",
    "require_tensors",
    "save",
]


def read(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The configuration of an official folder, and the content of its config.json.

    The second is what `save` takes as `config_extra`, so that no entry of the file is lost.

    Raises:
        CheckpointMismatch: the file is missing or does not describe such a model.
    """
    values = read_json_object(folder / CONFIG_FILE)
    try:
        return parse(values), values
    except ConfigError as error:
        raise CheckpointMismatch(f"{folder / CONFIG_FILE}: {error}") from error


def load(
    folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> LanguageModel:
    """The model of an official folder, in evaluation mode, in `dtype` but for what stays float32.

    Each tensor is read straight into its parameter, so that little more than the model is needed.

    Raises:
        CheckpointMismatch: a config.json of something else; files that are incomplete or damaged;
            tensors that are missing, left over or of another shape.
    """
    config, _ = read(folder)
    weights = open_folder(folder)
    model = meta_model(config, dtype)
    wanted = stored_tensors(model)
    require_tensors(weights, config, wanted)
    values = allocate(wanted, device)
    for rule in key_map.rules(config):
        first = 0
        for name in rule.ours:
            weights.fill(rule.official, values[name], first=first)
            first += values[name].numel()
    materialise(model, {id(wanted[name]): value for name, value in values.items()})
    return model.eval()


def save(
    folder: Path,
    model: LanguageModel,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    config_extra: Mapping[str, Any] | None = None,
    tokenizer_folder: Path | None = None,
) -> None:
    """Write an official folder, complete or not at all; an older model folder is replaced.

    dtype: of the stored tensors; that of the model's weights if None.
    config_extra: further entries of config.json, such as token ids, as `read` gives them.
    tokenizer_folder: where tokenizer files to be copied are, if any.

    Raises:
        ConfigError: the official class cannot express this model, with the reason.
        WriteFailed: the operating system refused, or `folder` holds something else.
    """
    dtype = dtype or model.head_weight.dtype
    config = extend(model.config, config_extra or {}, dtype)
    refuse_foreign_folder(folder)
    tensors = stored_tensors(model)
    plans = plan_tensors(
        model.config,
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        dtype,
        lambda name: tensors[name],
    )
    with publish_folder(folder) as new:
        write_json(new / CONFIG_FILE, config)
        write_folder(new, plans, max_shard_bytes=max_shard_bytes)
        for name in TOKENIZER_FILES:
            if tokenizer_folder is not None and (tokenizer_folder / name).exists():
                shutil.copyfile(tokenizer_folder / name, new / name)


def require_tensors(weights: Weights, config: ModelConfig, wanted: Mapping[str, Tensor]) -> None:
    """Compare the tensors of official files with those of a model, given under our names.

    Raises:
        CheckpointMismatch: names what is missing, left over or misshapen, and what would fit.
    """
    weights.require(
        {
            rule.official: rule.shape(*(wanted[name].shape for name in rule.ours))
            for rule in key_map.rules(config)
        },
        lambda: _explain(config, weights.shapes),
    )


def plan_tensors(
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    make: Callable[[str], Tensor],
) -> list[TensorPlan]:
    """The official tensors to write, from the shapes and values of ours by name."""

    def plan(rule: Rule) -> TensorPlan:
        return TensorPlan(
            rule.official,
            torch.float32 if rule.float32 else dtype,
            rule.shape(*(shapes[name] for name in rule.ours)),
            lambda: [make(name) for name in rule.ours],
        )

    return [plan(rule) for rule in key_map.rules(config)]


def _explain(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What the official tensors in a file would fit."""
    if config.tie_embeddings and key_map.HEAD.official in shapes:
        return "its head is not tied: set tie_word_embeddings to false in config.json to use it"
    return explain_misfit(config, key_map.own_shapes(shapes))
