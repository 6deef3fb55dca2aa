"""Models on disk: a folder with config.json, model.safetensors and tokenizer.json.

Tensors carry the names of `state_dict`; a tensor used in two places (tied embeddings) is stored
once, under its first name.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sambay.errors import CheckpointMismatch, ConfigError
from sambay.files import WriteFailed, write_json
from sambay.model import LanguageModel
from sambay.spec.model_config import ModelConfig

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")  # the second names the EOS token
FORMAT_VERSION = 1


def save_model_folder(path: Path, model: LanguageModel, tokenizer_file: Path) -> None:
    """Write the folder so that it appears complete or not at all; an older one is replaced.

    The tokenizer is copied together with the tokenizer_config.json beside it, if there is one.

    Raises:
        WriteFailed: the operating system refused; an older folder stays as it was.
    """
    with publish_folder(path) as folder:
        write_json(
            folder / CONFIG_FILE, {"format_version": FORMAT_VERSION, **model.config.to_dict()}
        )
        write_tensors(folder / WEIGHTS_FILE, stored_tensors(model))
        shutil.copyfile(tokenizer_file, folder / TOKENIZER_FILES[0])
        settings = tokenizer_file.with_name(TOKENIZER_FILES[1])
        if settings.exists():
            shutil.copyfile(settings, folder / TOKENIZER_FILES[1])


def load_model_folder(
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    expected: ModelConfig | None = None,
) -> LanguageModel:
    """The model in a folder, in evaluation mode, in `dtype` but for what must stay float32.

    Raises:
        CheckpointMismatch: no model there, a damaged file, tensors that are missing, left over or
            of another shape (names them), or a configuration other than `expected` (names the
            first differing field).
    """
    config = read_model_config(path / CONFIG_FILE)
    difference = None if expected is None else expected.first_difference(config)
    if difference is not None:
        name, wanted, found = difference
        raise CheckpointMismatch(
            f"{path / CONFIG_FILE}: model.{name} = {found!r}, expected {wanted!r}; "
            "this folder holds another architecture"
        )
    return build_from_weights(config, path / WEIGHTS_FILE, dtype=dtype, device=device)


def read_model_config(path: Path) -> ModelConfig:
    """The configuration in a model folder's config.json.

    Raises:
        CheckpointMismatch: the file is missing or does not describe a model of this format.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointMismatch(
            f"{path} does not exist; give a model folder, a checkpoint or a run directory"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointMismatch(f"{path} cannot be read: {error}") from error
    version = values.pop("format_version", None) if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointMismatch(
            f"{path}: format_version = {version!r}, this version of sambay reads {FORMAT_VERSION}"
        )
    try:
        return ModelConfig.from_dict(values)
    except ConfigError as error:
        raise CheckpointMismatch(f"{path}: {error}") from error


def build_from_weights(
    config: ModelConfig,
    weights: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LanguageModel:
    """A model of this configuration with the tensors of a safetensors file, in evaluation mode.

    Raises:
        CheckpointMismatch: as `load_model_folder`.
    """
    with torch.device("meta"):
        model = LanguageModel(config)
    wanted = stored_tensors(model)
    check_tensors(wanted, weights)
    with _opened(weights) as file:
        values = {id(tensor): file.get_tensor(name).clone() for name, tensor in wanted.items()}
    materialise(model, values)
    return model.to(device=device, dtype=dtype).eval()


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model by name, each once however many names it has."""
    seen: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if seen.setdefault(id(tensor), name) == name:
            tensors[name] = tensor
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file.

    Raises:
        WriteFailed: the operating system refused (disk full, no permission).
    """
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    except (OSError, SafetensorError) as error:
        full = "os error 28" in str(error) or "No space left" in str(error)
        reason = "the disk is full; free some space and run the command again" if full else error
        raise WriteFailed(f"cannot write {path}: {reason}") from error


def check_tensors(wanted: Mapping[str, Tensor], path: Path) -> None:
    """Compare names and shapes in a safetensors file with `wanted`, without reading the data.

    Raises:
        CheckpointMismatch: names the first tensor that is missing, left over or misshapen.
    """
    with _opened(path) as file:
        names = set(file.keys())
        for problem, found in (
            ("misses", sorted(wanted.keys() - names)),
            ("has an unknown", sorted(names - wanted.keys())),
        ):
            if found:
                more = f" and {len(found) - 1} more" if len(found) > 1 else ""
                raise CheckpointMismatch(
                    f"{path} {problem} tensor '{found[0]}'{more}; "
                    "it belongs to a model of another architecture"
                )
        for name, tensor in wanted.items():
            shape = tuple(file.get_slice(name).get_shape())
            if shape != tuple(tensor.shape):
                raise CheckpointMismatch(
                    f"{path}: tensor '{name}' has shape {shape}, the model needs "
                    f"{tuple(tensor.shape)}; it belongs to a model of another size"
                )


def load_tensors(targets: Mapping[str, Tensor], path: Path) -> None:
    """Copy a safetensors file into tensors of the same names, in place.

    Raises:
        CheckpointMismatch: as `check_tensors`, before anything is copied.
    """
    check_tensors(targets, path)
    with _opened(path) as file, torch.no_grad():
        for name, target in targets.items():
            target.copy_(file.get_tensor(name))


@contextlib.contextmanager
def publish_folder(path: Path) -> Iterator[Path]:
    """A new folder whose content appears at `path` only when the block ends without error.

    The files are flushed to the disk and the folder is renamed as a whole; after a kill at any
    moment `path` is absent, or complete. An existing folder is replaced.

    Raises:
        WriteFailed: the operating system refused; nothing was left behind.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.new."))
    except OSError as error:
        raise WriteFailed(f"cannot create a folder in {path.parent}: {error}") from error
    try:
        yield temporary
        for file in (*temporary.iterdir(), temporary):
            _flush(file)
        temporary.chmod(0o755)
        if path.exists():
            remove_folder(path)
        temporary.rename(path)
        _flush(path.parent)
    except OSError as error:
        raise WriteFailed(
            f"cannot write {path}: {error}; check the disk space and the permissions"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder so that a kill in between leaves it whole or hidden, never half of it.

    Raises:
        WriteFailed: the operating system refused.
    """
    try:
        hidden = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
        path.rename(hidden / path.name)
        shutil.rmtree(hidden)
    except OSError as error:
        raise WriteFailed(f"cannot remove {path}: {error}; check its permissions") from error


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left in `folder`: hidden folders of the two functions above."""
    for pattern in (".*.new.*", ".*.old.*"):
        for left in folder.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)


def materialise(model: nn.Module, values: Mapping[int, Tensor]) -> None:
    """Give every parameter of a model built on the meta device a value.

    `values` is keyed by the `id` of the meta parameter, so that tied parameters stay tied.
    """
    parameters = {key: nn.Parameter(value) for key, value in values.items()}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, parameters[id(parameter)])
    assert not any(buffer.is_meta for buffer in model.buffers()), "buffers have no stored values"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except FileNotFoundError as error:
        raise CheckpointMismatch(f"{path} does not exist; the folder is incomplete") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointMismatch(
            f"{path} is damaged or no safetensors file ({error}); use another copy"
        ) from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
