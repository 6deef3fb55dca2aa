"""Which model it was: its name and a fingerprint of everything its numbers come from."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from sambay.errors import CheckpointMismatch
from sambay.files import sha256_of
from sambay.hf.tokenizer import CONFIG_FILE
from sambay.spec import ModelConfig
from sambay.train.export import find_checkpoint
from sambay.train.run_dir import MODEL
from sambay.train.same_run import STATE_FILE

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def resolve_model(path: Path) -> Path:
    """The checkpoint or model folder that `path` means: a run that goes on writes newer ones.

    Raises:
        CheckpointMismatch: nothing is there.
    """
    if not path.exists():
        raise CheckpointMismatch(
            f"model {path} does not exist; give a model folder, a training run directory or a "
            "checkpoint"
        )
    _, checkpoint = find_checkpoint(path)
    if checkpoint is not None:
        return checkpoint
    return path / MODEL if (path / MODEL / CONFIG_FILE).exists() else path


def beside(resolved: Path) -> Path:
    """The folder with the tokenizer and the settings of a checkpoint or model folder."""
    run_dir, checkpoint = find_checkpoint(resolved)
    return resolved if checkpoint is None else run_dir


def model_name(path: Path) -> str:
    """The last part of the path that was given."""
    # Not `resolve`: a link is a name that somebody chose.
    return Path(os.path.abspath(path)).name


def weights_sha256(resolved: Path) -> str:
    """A fingerprint of the configuration and the weights, whose files are streamed.

    A checkpoint lists the fingerprints of its files, which are checked when it is read.
    """
    if (resolved / STATE_FILE).exists():
        return sha256_of(resolved / STATE_FILE)
    total = hashlib.sha256()
    files = [resolved / CONFIG_FILE]
    files += sorted(path for pattern in _WEIGHTS for path in resolved.glob(pattern))
    for file in files:
        if file.exists():
            total.update(f"{file.name} {sha256_of(file)}\n".encode())
    return total.hexdigest()


def architecture_facts(config: ModelConfig) -> dict[str, Any]:
    """What tells one architecture from another, its size, and its window (None: it has none)."""
    return {
        "layer_pattern": config.layer_pattern,
        "attention_variant": config.attention_variant.value,
        "position": config.position.value,
        "hidden_size": config.hidden_size,
        "window": config.window,
    }
