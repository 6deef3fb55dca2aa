"""From the tensors in a model folder to the parameters vLLM's process has; knows no vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from sambay.errors import CheckpointMismatch
from sambay.hf import key_map, official
from sambay.model.folder import stored_name
from sambay.spec import ModelConfig, RecurrentKind


def native_tensors(
    config: ModelConfig, model_type: str, tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The same tensors under the names of the native format, split where that format splits.

    Raises:
        CheckpointMismatch: a tensor the official format does not have.
    """
    if model_type != official.MODEL_TYPE:
        yield from tensors
        return
    rules = {rule.official: rule for rule in key_map.rules(config)}
    for name, tensor in tensors:
        if name == key_map.HEAD.official and config.tie_embeddings:
            raise CheckpointMismatch(
                f"{name} is there, but config.json ties it to the embedding; "
                "set tie_word_embeddings to false to use it"
            )
        if name not in rules:
            raise CheckpointMismatch(f"{name} is no tensor of this model; is config.json its own?")
        rule = rules[name]
        parts = key_map.to_ours(rule, tensor, config)
        yield from zip((stored_name(ours) for ours in rule.ours), parts, strict=True)


def parameter_name(stored: str, config: ModelConfig) -> str:
    """What a tensor of the native format is called among the parameters of the served model."""
    if stored.endswith(".mixer.A_log") and config.recurrent_kind is RecurrentKind.MAMBA:
        return stored.removesuffix("A_log") + "A"
    if config.recurrent_kind is not RecurrentKind.MAMBA:
        prefix, dot, rest = stored.partition(".mixer.")
        index = prefix.rpartition(".")[2]
        if dot and config.layers[int(index)].kind.value == "M":
            return f"{prefix}.mixer.inner.{rest}"
    return stored


def require_all(parameters: dict[str, nn.Parameter], loaded: set[str]) -> None:
    """Refuse a folder that leaves parameters as they were.

    Raises:
        CheckpointMismatch: names the first of them.
    """
    missing = sorted(parameters.keys() - loaded)
    if missing:
        raise CheckpointMismatch(
            f"{len(missing)} of the model's tensors are missing, such as that of {missing[0]}; "
            "is config.json its own?"
        )


def misfit(name: str, stored: Tensor, found: torch.Size, error: Exception) -> CheckpointMismatch:
    """What to say of a tensor that does not fit its parameter."""
    return CheckpointMismatch(
        f"{name} has shape {tuple(stored.shape)}, which does not fit {tuple(found)} ({error})"
    )
