"""What is checked before transformers reads the weights of a local folder.

Left to itself, transformers warns about tensors that are missing or left over and goes on with
random numbers, and unpickles a folder that has no safetensors files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sambay.errors import CheckpointMismatch
from sambay.hf import official
from sambay.model import folder as native
from sambay.model.folder import CONFIG_FILE, meta_model, read_json_object, stored_tensors
from sambay.model.weights import INDEX_FILE, WEIGHTS_FILE, Weights, list_names, open_folder
from sambay.spec import ModelConfig

# With these, what is loaded is not (only) what the folder's safetensors files hold.
_OTHER_SOURCES = (
    "gguf_file",
    "ignore_mismatched_sizes",
    "key_mapping",
    "output_loading_info",
    "quantization_config",
    "state_dict",
    "variant",
)
_OTHER_FILES = ("adapter_config.json", ".metadata")  # of PEFT; of distributed checkpoints
_CLASSES = {
    native.MODEL_TYPE: native.ARCHITECTURE,
    official.MODEL_TYPE: official.ARCHITECTURE,
}


def model_folder(path: Any, arguments: Mapping[str, Any]) -> Path | None:
    """The local folder whose files will be read; None where there is nothing to check.

    arguments: those of `from_pretrained`.
    """
    if path is None or any(arguments.get(name) for name in _OTHER_SOURCES):
        return None
    folder = Path(path) / (arguments.get("subfolder") or "")
    if not folder.is_dir() or any((folder / name).exists() for name in _OTHER_FILES):
        return None
    return folder


def check_model_type(source: Path, expected: str) -> None:
    """Refuse a folder with the config.json, or such a file, of a model of another type.

    Raises:
        CheckpointMismatch: names the type found, and the class that reads it.
    """
    file = source / CONFIG_FILE if source.is_dir() else source
    if file.exists():
        check_class(read_json_object(file).get("model_type"), expected, where=f"{file}: ")


def check_class(found: object, expected: str, *, where: str = "") -> None:
    """Refuse a model type that is not the one a class was made for.

    Raises:
        CheckpointMismatch: names the type found, and the class that reads it.
    """
    if found == expected:
        return
    if found in _CLASSES:
        remedy = f"use {_CLASSES[str(found)]} or AutoModelForCausalLM"
    else:
        remedy = f"{_CLASSES[expected]} reads '{expected}'"
    raise CheckpointMismatch(
        f"{where}model_type = {found!r} does not belong to {_CLASSES[expected]}; {remedy}"
    )


def check_files(folder: Path, *, pickled: bool) -> Weights | None:
    """The tensors in the safetensors files of a folder, of which only the headers are read.

    None with `pickled`, where others are read instead, and where there are none at all, which
    transformers says itself.

    Raises:
        CheckpointMismatch: only pickled weights without `pickled`; files that are missing,
            incomplete or damaged.
    """
    if pickled:
        return None
    if not any((folder / name).exists() for name in (WEIGHTS_FILE, INDEX_FILE)):
        found = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        if found:
            raise CheckpointMismatch(
                f"{folder} has only pickled weights ({list_names(found)}), which can run code when "
                "they are read; get the safetensors files, or pass use_safetensors=False to read "
                "them anyway"
            )
        return None
    return open_folder(folder)


def check_tensors(weights: Weights, config: ModelConfig, model_type: str) -> None:
    """Compare the tensors of a folder with those of a model and its head.

    Files that hold a model without its head are left to transformers.

    Raises:
        CheckpointMismatch: lists the tensors that are missing, left over or of another shape, and
            says what the files fit.
    """
    if not any(name.startswith("model.") for name in weights.tensors):
        return
    tensors = stored_tensors(meta_model(config, torch.float32))
    # transformers can save the official class under our names (`save_original_format=False`).
    ours = any(name.startswith("model.blocks.") for name in weights.tensors)
    if model_type == native.MODEL_TYPE or ours:
        native.require_tensors(weights, config, tensors)
    else:
        official.require_tensors(weights, config, tensors)
