"""Any model folder, native or official: told apart by the `model_type` in its config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sambay.errors import CheckpointMismatch, ConfigError
from sambay.hf import official
from sambay.model import LanguageModel
from sambay.model.folder import (
    CONFIG_FILE,
    MODEL_TYPE,
    load_model_folder,
    parse_config,
    read_json_object,
)
from sambay.spec import ModelConfig


def load_model(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> LanguageModel:
    """The model in a native or official folder, in evaluation mode.

    All in `dtype` but for what must stay float32. Tensors are read straight into the parameters.

    Raises:
        CheckpointMismatch: no model folder of these two kinds, or one that is damaged, incomplete
            or of another shape than its config.json says.
    """
    folder = Path(path)
    if _read(folder)["model_type"] == MODEL_TYPE:
        return load_model_folder(folder, dtype=dtype, device=device)
    return official.load(folder, dtype=dtype, device=device)


def read_config(path: str | Path) -> ModelConfig:
    """The configuration of a native or official folder.

    Raises:
        CheckpointMismatch: no model folder of these two kinds, or a configuration that cannot work.
    """
    folder = Path(path)
    values = _read(folder)
    parse = parse_config if values["model_type"] == MODEL_TYPE else official.parse
    try:
        return parse(values)
    except ConfigError as error:
        raise CheckpointMismatch(f"{folder / CONFIG_FILE}: {error}") from error


def is_model_folder(path: str | Path) -> bool:
    """Whether there is a config.json that names a model type, which a run directory's does not."""
    file = Path(path) / CONFIG_FILE
    return file.is_file() and "model_type" in read_json_object(file)


def _read(folder: Path) -> dict[str, Any]:
    """The content of config.json, whose model type is one of the two."""
    if not folder.exists():
        raise CheckpointMismatch(f"{folder} does not exist; give a model folder")
    if not folder.is_dir():
        raise CheckpointMismatch(
            f"{folder} is a file; give the folder that holds it and {CONFIG_FILE}"
        )
    if not (folder / CONFIG_FILE).exists():
        raise CheckpointMismatch(f"{folder} {_why_no_config(folder)}")
    values = read_json_object(folder / CONFIG_FILE)
    kind = values.get("model_type")
    if kind not in (MODEL_TYPE, official.MODEL_TYPE):
        reason = official.other_model_type(kind)
        raise CheckpointMismatch(f"{folder / CONFIG_FILE}: {reason}")
    return values


def _why_no_config(folder: Path) -> str:
    downloaded = sorted((folder / "snapshots").glob(f"*/{CONFIG_FILE}"))
    if downloaded:  # the cache of the Hugging Face Hub has its folders below the one of the model
        return f"is a download cache; give {downloaded[-1].parent}"
    what = "has no config.json" if any(folder.iterdir()) else "is empty"
    return f"{what}; give a folder with config.json and weights"
