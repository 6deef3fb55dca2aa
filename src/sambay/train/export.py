"""From checkpoints to models: one to use at once, or a model folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from sambay.errors import CheckpointMismatch
from sambay.files import write_json
from sambay.hf.loading import is_model_folder, load_model
from sambay.model import LanguageModel
from sambay.model.folder import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    allocate,
    config_values,
    copy_tokenizer,
    materialise,
    meta_model,
    refuse_foreign_folder,
    stored_name,
    stored_tensors,
)
from sambay.model.publish import publish_folder
from sambay.model.weights_writer import TensorPlan, write_folder
from sambay.spec.model_config import ModelConfig
from sambay.train.checkpoint import MODEL_PREFIX, CheckpointStore, check_files
from sambay.train.config import CheckpointConfig
from sambay.train.pieces import load_pieces, pieces_of
from sambay.train.run_dir import CHECKPOINTS, MODEL
from sambay.train.same_run import STATE_FILE, read_state, stored_config

_BATCH_BYTES = 256 << 20  # every reading goes through the list of all pieces


def export_model(path: Path, folder: Path | None = None) -> Path:
    """The model folder made from a run directory's newest checkpoint, or from one checkpoint.

    It is RUN_DIR/model unless another `folder` is given. Only a few tensors are in memory at once.

    Raises:
        CheckpointMismatch: no checkpoint is there, or it is damaged.
        WriteFailed: the operating system refused, or `folder` holds something else.
    """
    run_dir, checkpoint = find_checkpoint(path)
    if checkpoint is None:
        raise CheckpointMismatch(f"{path} has no checkpoint to export; train at least one step")
    folder = folder or run_dir / MODEL
    config = _checked_config(checkpoint)
    wanted = stored_tensors(meta_model(config, torch.float32))

    read = _Reader(checkpoint, {name: tensor.shape for name, tensor in wanted.items()})
    plans = [
        TensorPlan(stored_name(name), torch.float32, tuple(tensor.shape), lambda n=name: (read(n),))
        for name, tensor in wanted.items()
    ]
    refuse_foreign_folder(folder)
    with publish_folder(folder) as temporary:
        write_json(temporary / CONFIG_FILE, config_values(config, torch.float32))
        write_folder(temporary, plans)
        copy_tokenizer(run_dir / TOKENIZER_FILE, temporary)
    return folder


def load_checkpoint_model(
    path: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[LanguageModel, ModelConfig, Path]:
    """The model, its configuration and the path of its tokenizer.json.

    `path` is a run directory (its newest checkpoint, else its exported model), one checkpoint in
    it, or a model folder.

    Raises:
        CheckpointMismatch: nothing of the kind is there, or it is damaged.
    """
    run_dir, checkpoint = find_checkpoint(path)
    if checkpoint is not None:
        config = _checked_config(checkpoint)
        model = meta_model(config, dtype)
        wanted = stored_tensors(model)
        values = allocate(wanted, device)
        load_pieces({MODEL_PREFIX + name: pieces_of(x) for name, x in values.items()}, checkpoint)
        materialise(model, {id(wanted[name]): value for name, value in values.items()})
        return model.eval(), config, run_dir / TOKENIZER_FILE
    folder = path / MODEL if (path / MODEL / CONFIG_FILE).exists() else path
    if not is_model_folder(folder):
        raise CheckpointMismatch(
            f"{path} holds no model; give a run directory of `sambay train` with at least one "
            "checkpoint, a checkpoint, or a model folder"
        )
    model = load_model(folder, dtype=dtype, device=device)
    return model, model.config, folder / TOKENIZER_FILE


class _Reader:
    """Gives the weights of a checkpoint by name, in the order of `shapes`, a batch ahead."""

    def __init__(self, checkpoint: Path, shapes: Mapping[str, torch.Size]) -> None:
        self._checkpoint = checkpoint
        self._left = dict(shapes)
        self._ahead: dict[str, torch.Tensor] = {}

    def __call__(self, name: str) -> torch.Tensor:
        if name not in self._ahead:
            wanted, size = {}, 0
            for later, shape in self._left.items():
                size += shape.numel() * 4
                if wanted and size > _BATCH_BYTES:
                    break
                wanted[later] = torch.empty(shape)
            load_pieces(
                {MODEL_PREFIX + later: pieces_of(value) for later, value in wanted.items()},
                self._checkpoint,
            )
            self._ahead = wanted
        del self._left[name]
        return self._ahead.pop(name)


def find_checkpoint(path: Path) -> tuple[Path, Path | None]:
    """The run directory, and the checkpoint that `path` means."""
    if (path / STATE_FILE).exists():
        return path.parent.parent, path
    if (path / CHECKPOINTS).is_dir():
        return path, CheckpointStore(path, CheckpointConfig()).latest()
    return path, None


def _checked_config(checkpoint: Path) -> ModelConfig:
    state = read_state(checkpoint)
    check_files(checkpoint, state)
    return stored_config(checkpoint, state["config"]).model
