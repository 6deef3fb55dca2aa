"""Checkpoints: folders that are complete or invisible, and the exact continuation from them.

checkpoints/step-00000100/ holds model.safetensors, optimizer.safetensors (both moments of AdamW)
and state.json: step, tokens, seconds, the configuration, the hash of the data manifest and the
SHA-256 of both files. Training draws no random numbers (batches are a function of seed and step),
so there is no generator state to keep.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sambay.errors import CheckpointMismatch, ConfigError
from sambay.files import sha256_of, write_json
from sambay.hf.loading import is_model_folder, load_model
from sambay.model import LanguageModel
from sambay.model.folder import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    build_from_weights,
    check_tensors,
    load_tensors,
    stored_tensors,
    write_tensors,
)
from sambay.model.publish import publish_folder, remove_folder, remove_leftovers
from sambay.model.weights import WEIGHTS_FILE
from sambay.spec.model_config import ModelConfig
from sambay.train.config import CheckpointConfig, RunConfig
from sambay.train.optim import optimizer_tensors, set_optimizer_step
from sambay.train.run_dir import CHECKPOINTS, MODEL

OPTIMIZER_FILE, STATE_FILE = "optimizer.safetensors", "state.json"

FORMAT_VERSION = 1

# Fields that change no result (or its rounding only): a run may continue with other values.
_FREE = (
    "data.directory",
    "data.verify",
    "batch.micro_batch_size",
    "evaluation.",
    "checkpoint.",
    "logging.",
    "activation_checkpointing",
    "device",
    "threads",
)
_SCHEDULE = ("optimizer.", "schedule.", "regularisation.")


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # spent training, over all restarts


class CheckpointStore:
    """The checkpoints of one run directory."""

    def __init__(self, run_dir: Path, policy: CheckpointConfig) -> None:
        self.folder = run_dir / CHECKPOINTS
        self.policy = policy

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, ascending."""
        matches = [re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.glob("step-*")]
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.folder / f"step-{step:08d}"

    def latest(self) -> Path | None:
        """The newest complete checkpoint, if any."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def save(
        self,
        progress: Progress,
        model: LanguageModel,
        optimizer: torch.optim.Optimizer,
        config: RunConfig,
        manifest_hash: str,
    ) -> Path:
        """Publish a checkpoint, then remove those that the policy no longer keeps.

        Raises:
            WriteFailed: the operating system refused; all earlier checkpoints are still there.
        """
        path = self.path(progress.step)
        with publish_folder(path) as folder:
            write_tensors(folder / WEIGHTS_FILE, stored_tensors(model))
            write_tensors(folder / OPTIMIZER_FILE, optimizer_tensors(optimizer, model))
            state = {
                "format_version": FORMAT_VERSION,
                "step": progress.step,
                "tokens": progress.tokens,
                "seconds": progress.seconds,
                "data_manifest": manifest_hash,
                "files": {
                    name: sha256_of(folder / name) for name in (WEIGHTS_FILE, OPTIMIZER_FILE)
                },
                "config": config.to_dict(),
            }
            write_json(folder / STATE_FILE, state)
        self._prune()
        return path

    def clean(self) -> None:
        """Remove what a killed process left half-written."""
        remove_leftovers(self.folder)

    def _prune(self) -> None:
        every = self.policy.keep_every_steps
        for step in self.steps()[: -self.policy.keep]:
            if every is None or step % every:
                remove_folder(self.path(step))


def restore(path: Path, model: LanguageModel, optimizer: torch.optim.Optimizer) -> Progress:
    """How far the run of a checkpoint had come, after filling model and optimiser from it.

    `check_same_run` first tells whether it is a checkpoint of the same run.

    Raises:
        CheckpointMismatch: a damaged file, or tensors of another model; nothing was changed.
    """
    state = read_state(path)
    check_files(path, state)
    moments = optimizer_tensors(optimizer, model)
    check_tensors(moments, path / OPTIMIZER_FILE)
    load_tensors(stored_tensors(model), path / WEIGHTS_FILE)
    load_tensors(moments, path / OPTIMIZER_FILE)
    set_optimizer_step(optimizer, model.parameters(), state["step"])
    return Progress(state["step"], state["tokens"], state["seconds"])


def check_same_run(
    path: Path, config: RunConfig, manifest_hash: str, *, change_schedule: bool = False
) -> dict[str, Any]:
    """The state of a checkpoint that belongs to this configuration and data.

    `change_schedule` permits other values in `optimizer`, `schedule` and `regularisation` than
    the checkpoint's.

    Raises:
        CheckpointMismatch: another configuration (names the first differing field and both
            values), other data, or a damaged state.json.
    """
    state = read_state(path)
    allowed = _FREE + _SCHEDULE if change_schedule else _FREE
    _check_same_config(path, state["config"], config, allowed)
    # The sets of a mixture have their hashes in its order, between commas.
    stored, mine = state["data_manifest"].split(","), manifest_hash.split(",")
    for number, (theirs, hash_now) in enumerate(zip(stored, mine, strict=True)):
        if theirs != hash_now:
            folder = config.data.sources[number].directory
            name = f"data.mixture: {folder!r}" if len(mine) > 1 else f"data.directory = {folder!r}"
            raise CheckpointMismatch(
                f"{name} holds other data (manifest {hash_now[:12]}) than {path} was trained on "
                f"(manifest {theirs[:12]}); restore that data or use another --run-dir"
            )
    return state


def read_state(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's state.json.

    Raises:
        CheckpointMismatch: the file is missing, damaged or of another format.
    """
    file = path / STATE_FILE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        version = state["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointMismatch(
            f"{file} is missing or damaged ({error}); remove {path} to use an earlier checkpoint"
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointMismatch(
            f"{file}: format_version = {version!r}, this version of sambay reads {FORMAT_VERSION}"
        )
    return state


def check_files(path: Path, state: dict[str, Any]) -> None:
    """Compare the files of a checkpoint with their checksums.

    Raises:
        CheckpointMismatch: names the file that is missing or differs.
    """
    for name, checksum in state["files"].items():
        file = path / name
        if not file.exists() or sha256_of(file) != checksum:
            raise CheckpointMismatch(
                f"{file} is {'damaged (its checksum differs)' if file.exists() else 'missing'}; "
                f"remove {path} to continue from an earlier checkpoint"
            )


def load_checkpoint_model(
    path: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[LanguageModel, ModelConfig, Path]:
    """The model, its configuration and the path of its tokenizer.json.

    `path` is a run directory (its newest checkpoint, else its exported model), one checkpoint in
    it, or a model folder.

    Raises:
        CheckpointMismatch: nothing of the kind is there, or it is damaged.
    """
    run_dir, checkpoint = path, None
    if (path / STATE_FILE).exists():
        run_dir, checkpoint = path.parent.parent, path
    elif (path / CHECKPOINTS).is_dir():
        checkpoint = CheckpointStore(path, CheckpointConfig()).latest()
    if checkpoint is not None:
        state = read_state(checkpoint)
        check_files(checkpoint, state)
        config = _stored_config(checkpoint, state["config"]).model
        model = build_from_weights(config, checkpoint / WEIGHTS_FILE, dtype=dtype, device=device)
        return model, config, run_dir / TOKENIZER_FILE
    folder = path / MODEL if (path / MODEL / CONFIG_FILE).exists() else path
    if not is_model_folder(folder):
        raise CheckpointMismatch(
            f"{path} holds no model; give a run directory of `sambay train` with at least one "
            "checkpoint, a checkpoint, or a model folder"
        )
    model = load_model(folder, dtype=dtype, device=device)
    return model, model.config, folder / TOKENIZER_FILE


def _stored_config(path: Path, values: dict[str, Any]) -> RunConfig:
    try:
        return RunConfig.from_dict(values)
    except ConfigError as error:
        raise CheckpointMismatch(f"{path / STATE_FILE}: {error}") from error


def _check_same_config(
    path: Path, stored: dict[str, Any], config: RunConfig, allowed: tuple[str, ...]
) -> None:
    mine = _comparable(config)
    for name, theirs in _comparable(_stored_config(path, stored)).items():
        if mine[name] != theirs and not name.startswith(allowed):
            hint = ", or continue with --change-schedule" if name.startswith(_SCHEDULE) else ""
            raise CheckpointMismatch(
                f"{name} = {mine[name]!r}, but {path} was made with {theirs!r}; "
                f"set it back, or use another --run-dir or --fresh{hint}"
            )


def _comparable(config: RunConfig) -> dict[str, Any]:
    """All fields by name; of the training sets only the weights, since folders may move."""
    values = config.to_dict()
    values["data"]["mixture"] = [source.weight for source in config.data.sources]
    return _flat(values)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
