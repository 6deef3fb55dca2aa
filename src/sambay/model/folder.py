"""The native model folder: config.json, model.safetensors (or shards) and the tokenizer.

The same folder is read by transformers' Auto classes. Its tensors carry the names of `state_dict`
below `model.`, but for the head, `lm_head.weight`; tied embeddings are stored once.
"""

from __future__ import annotations

import difflib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sambay.errors import CheckpointMismatch, ConfigError
from sambay.files import WriteFailed, write_json
from sambay.model import LanguageModel
from sambay.model.fit import explain_misfit
from sambay.model.publish import publish_folder
from sambay.model.weights import Weights, open_file, open_folder
from sambay.model.weights_writer import (
    DEFAULT_SHARD_BYTES,
    plan_tensor,
    write_file,
    write_folder,
)
from sambay.spec.layers import LayerKind
from sambay.spec.model_config import ModelConfig

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
# What may lie beside it: the first names the EOS token.
TOKENIZER_COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
TOKENIZER_FILES = (TOKENIZER_FILE, *TOKENIZER_COMPANIONS)
MODEL_TYPE, ARCHITECTURE = "sambay", "SambaYForCausalLM"
FORMAT_VERSION = 1

_LAYER_TYPES = {
    LayerKind.MAMBA: "linear_attention",
    LayerKind.GATED_MEMORY: "linear_attention",
    LayerKind.SLIDING: "sliding_attention",
    LayerKind.FULL: "full_attention",
    LayerKind.CROSS: "full_attention",
}
_HEAD, _STORED_HEAD, _PREFIX = "head.weight", "lm_head.weight", "model."
# Entries of other programs that look like a field of ours.
_FOREIGN = ("tie_embeddings", "num_layers", "rms_norm_eps", "layer_norm_eps", "layer_types")
_MISSPELT = 0.8


def save_model_folder(
    path: Path,
    model: LanguageModel,
    tokenizer_file: Path | None = None,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write the folder so that it appears complete or not at all; an older one is replaced.

    The tokenizer, if one is given, is copied together with its companions beside it.

    Raises:
        WriteFailed: the operating system refused, or `path` is a folder of something else; what
            was there stays as it was.
    """
    refuse_foreign_folder(path)
    plans = [
        plan_tensor(stored_name(name), tensor) for name, tensor in stored_tensors(model).items()
    ]
    with publish_folder(path) as folder:
        write_json(folder / CONFIG_FILE, config_values(model.config, model.head_weight.dtype))
        write_folder(folder, plans, max_shard_bytes=max_shard_bytes)
        if tokenizer_file is not None:
            copy_tokenizer(tokenizer_file, folder)


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
    return _build(config, open_folder(path), dtype=dtype, device=device, prefixed=True)


def config_values(config: ModelConfig, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The content of config.json; `dtype` is what transformers calls that of the weights."""
    fields = config.to_dict()
    fields["tie_word_embeddings"] = fields.pop("tie_embeddings")
    fields["num_hidden_layers"] = fields.pop("num_layers")
    fields["layer_types"] = layer_types(config)
    if dtype is not None:
        fields["dtype"] = str(dtype).removeprefix("torch.")
    head = {"model_type": MODEL_TYPE, "architectures": [ARCHITECTURE]}
    return head | {"format_version": FORMAT_VERSION} | fields


def parse_config(values: Mapping[str, Any]) -> ModelConfig:
    """The configuration in the content of a config.json; entries of other programs are ignored.

    Raises:
        ConfigError: another model type or format version, a missing field, one that looks misspelt,
            or a value that cannot work.
    """
    if values.get("model_type") != MODEL_TYPE:
        raise ConfigError(
            f"model_type = {values.get('model_type')!r}; the native format has '{MODEL_TYPE}'"
        )
    version = values.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"format_version = {version!r}, this version of sambay reads {FORMAT_VERSION}"
        )
    names = {"tie_word_embeddings": "tie_embeddings", "num_hidden_layers": "num_layers"}
    known = ModelConfig.__dataclass_fields__.keys()
    fields = {
        names.get(name, name): value
        for name, value in values.items()
        if name in known or name in names
    }
    refuse_misspelt(values.keys() - fields.keys() - names.keys(), known - values.keys())
    return ModelConfig.from_dict(fields)


def refuse_misspelt(names: Iterable[str], fields: Iterable[str]) -> None:
    """Refuse a name that is no field but looks like one of `fields`; other names pass.

    Raises:
        ConfigError: the first such name, with the field it resembles.
    """
    fields = list(fields)
    for name in sorted(set(names) - set(_FOREIGN)):
        near = difflib.get_close_matches(name, fields, n=1, cutoff=_MISSPELT)
        if near:
            raise ConfigError(f"model.{name}: no such field (did you mean '{near[0]}'?)")


def layer_types(config: ModelConfig) -> list[str]:
    """What transformers calls the layers."""
    return [_LAYER_TYPES[layer.kind] for layer in config.layers]


def read_model_config(path: Path) -> ModelConfig:
    """The configuration in a native model folder's config.json.

    Raises:
        CheckpointMismatch: the file is missing or does not describe a model of this format.
    """
    values = read_json_object(path)
    try:
        return parse_config(values)
    except ConfigError as error:
        raise CheckpointMismatch(f"{path}: {error}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The content of a config.json.

    Raises:
        CheckpointMismatch: the file is missing or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointMismatch(
            f"{path} does not exist; give a model folder, a checkpoint or a run directory"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointMismatch(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointMismatch(f"{path} holds no JSON object; use the config.json of a model")
    return values


def build_from_weights(
    config: ModelConfig,
    weights: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LanguageModel:
    """A model of this configuration with the tensors of one file under their `state_dict` names.

    Raises:
        CheckpointMismatch: as `load_model_folder`.
    """
    return _build(config, open_file(weights), dtype=dtype, device=device, prefixed=False)


def stored_name(name: str) -> str:
    """What a tensor of `state_dict` is called in a native folder."""
    return _STORED_HEAD if name == _HEAD else _PREFIX + name


def own_name(stored: str) -> str:
    """What a tensor of a native folder is called in `state_dict`."""
    return _HEAD if stored == _STORED_HEAD else stored.removeprefix(_PREFIX)


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model by name, each once however many names it has."""
    seen: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if seen.setdefault(id(tensor), name) == name:
            tensors[name] = tensor
    return tensors


def require_tensors(
    weights: Weights, config: ModelConfig, wanted: Mapping[str, Tensor], *, prefixed: bool = True
) -> None:
    """Compare the tensors of a file with those of a model, given as `stored_tensors` does.

    prefixed: whether the file has the names of a native folder, or those of `state_dict`.

    Raises:
        CheckpointMismatch: names what is missing, left over or misshapen, and what would fit.
    """
    weights.require(
        {
            stored_name(name) if prefixed else name: tuple(tensor.shape)
            for name, tensor in wanted.items()
        },
        lambda: explain_misfit(
            config, {own_name(name): shape for name, shape in weights.shapes.items()}
        ),
    )


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file.

    Raises:
        WriteFailed: the operating system refused (disk full, no permission).
    """
    write_file(path, [plan_tensor(name, tensor) for name, tensor in tensors.items()])


def check_tensors(wanted: Mapping[str, Tensor], path: Path) -> None:
    """Compare names and shapes in a safetensors file with `wanted`, without reading the data.

    Raises:
        CheckpointMismatch: names the tensors that are missing, left over or misshapen.
    """
    open_file(path).require(_shapes(wanted))


def load_tensors(targets: Mapping[str, Tensor], path: Path) -> None:
    """Copy a safetensors file into tensors of the same names, in place.

    Raises:
        CheckpointMismatch: as `check_tensors`, before anything is copied.
    """
    weights = open_file(path)
    weights.require(_shapes(targets))
    for name, target in targets.items():
        weights.fill(name, target)


def meta_model(config: ModelConfig, dtype: torch.dtype) -> LanguageModel:
    """A model without data whose parameters have the dtypes it will have: see `allocate`."""
    with torch.device("meta"):
        return LanguageModel(config).to(dtype)


def allocate(tensors: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """Uninitialised memory for each of these meta tensors, by name."""
    return {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        for name, tensor in tensors.items()
    }


def materialise(model: nn.Module, values: Mapping[int, Tensor]) -> None:
    """Give every parameter of a model built on the meta device a value.

    `values` is keyed by the `id` of the meta parameter, so that tied parameters stay tied.
    """
    parameters = {key: nn.Parameter(value) for key, value in values.items()}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, parameters[id(parameter)])
    assert not any(buffer.is_meta for buffer in model.buffers()), "buffers have no stored values"


def copy_tokenizer(tokenizer_file: Path, folder: Path) -> None:
    """Copy a tokenizer.json and what belongs to it into a folder; a missing one is an OSError."""
    shutil.copyfile(tokenizer_file, folder / TOKENIZER_FILE)
    for name in TOKENIZER_COMPANIONS:
        if (companion := tokenizer_file.with_name(name)).exists():
            shutil.copyfile(companion, folder / name)


def refuse_foreign_folder(path: Path) -> None:
    """Keep a wrong path from replacing somebody's files by a model.

    Raises:
        WriteFailed: `path` is a file, or a folder with files but no config.json.
    """
    if path.is_dir():
        foreign = any(path.iterdir()) and not (path / CONFIG_FILE).exists()
    else:
        foreign = path.exists()
    if foreign:
        raise WriteFailed(f"{path} exists and is no model folder; choose another name")


def _build(
    config: ModelConfig,
    weights: Weights,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    prefixed: bool,
) -> LanguageModel:
    model = meta_model(config, dtype)
    wanted = stored_tensors(model)
    names = {name: stored_name(name) if prefixed else name for name in wanted}
    require_tensors(weights, config, wanted, prefixed=prefixed)
    values = allocate(wanted, device)
    for name, value in values.items():
        weights.fill(names[name], value)
    materialise(model, {id(wanted[name]): value for name, value in values.items()})
    return model.eval()


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
