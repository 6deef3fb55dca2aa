"""Reading ArchScale checkpoints (`.pth`) of the family's Mamba-1 and attention models.

Such a file stores tensors only. What shapes tell is derived from them; what they do not tell (the
parametrization with its multipliers, the window, positions, the number of heads) must be given,
because a wrong guess would load without complaint and compute nonsense. The name of the run only
yields suggestions. Layouts: the released code of arXiv 2507.06607.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sambay.errors import CheckpointMismatch
from sambay.hf.archscale_config import EMBEDDING, HEAD, LAYER, Settings, Shapes
from sambay.model import LanguageModel
from sambay.spec import LayerKind, ModelConfig

_PREFIXES = ("_forward_module.", "_orig_mod.")
_MLP = {"w1.weight": "in_proj.weight", "w3.weight": "out_proj.weight"}
_LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
_MIXERS: dict[str, dict[str, str]] = {  # theirs below `attn.`, ours below `mixer.`
    "M": {
        "in_proj.weight": "in_proj.weight",
        "conv1d.weight": "conv_weight",  # (E, 1, W) there, (E, W) here
        "conv1d.bias": "conv_bias",
        "x_proj.weight": "x_proj.weight",
        "dt_proj.weight": "dt_proj.weight",
        "dt_proj.bias": "dt_bias",
        "A_log": "A_log",
        "D": "D",
        "out_proj.weight": "out_proj.weight",
    },
    "G": {
        "gmu.in_proj.weight": "in_proj.weight",
        "gmu.out_proj.weight": "out_proj.weight",
    },
    "attention": {
        "proj.weight": "out_proj.weight",
        "proj.bias": "out_proj.bias",
        **{f"da.{name}": f"maps.{name}" for name in _LAMBDAS},
        "da.subln.weight": "maps.norm_weight",
    },
}


def load(path: Path, settings: Settings, dtype: torch.dtype | None = None) -> LanguageModel:
    """The model in an ArchScale checkpoint, in evaluation mode.

    dtype: of all but what must stay float32; that of the stored embedding if None.

    Raises:
        CheckpointMismatch: not such a file, a kind of layer this package does not have, missing,
            left-over or misshapen tensors.
        ConfigError: a setting that is missing (all are named) or contradicts the tensors.
    """
    tensors = read_tensors(path)
    dtype = dtype or tensors[EMBEDDING].dtype
    config = Shapes(tensors, path).describe(settings)
    with torch.device("meta"):
        model = LanguageModel(config)
    values = dict(_translated(tensors, config, path))
    if config.tie_embeddings:
        values["head.weight"] = values["embedding.weight"]
    for name, wanted in model.state_dict().items():
        found = values.get(name)
        if found is None or found.shape != wanted.shape:
            what = "nothing" if found is None else f"a tensor of shape {tuple(found.shape)}"
            raise CheckpointMismatch(
                f"{path}: has {what} for '{name}', which needs {tuple(wanted.shape)}; "
                "the file is incomplete or a setting does not belong to it"
            )
    left = sorted(values.keys() - model.state_dict().keys()) or sorted(tensors)
    if left:
        raise CheckpointMismatch(
            f"{path}: tensor '{left[0]}'{_more(left)} is unknown; this package does not have the "
            "layer or option it belongs to"
        )
    model.load_state_dict(values, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight
    return model.to(dtype).eval()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of the `model` entry (or of a bare state dict), mapped from the file.

    Prefixes that wrappers of torch put before names are removed.

    Raises:
        CheckpointMismatch: missing, damaged, no state dict, or a pickle with more than plain data
            in it, which could run code and is never opened.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise CheckpointMismatch(f"{path} does not exist; give an ArchScale .pth file") from error
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found is None:
            raise CheckpointMismatch(f"{path} is damaged; use another copy") from error
        raise CheckpointMismatch(
            f"{path} holds more than tensors ({found[1]}) and could run code; it was not opened: "
            "ask for a file with the 'model' entry only"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointMismatch(
            f"{path} cannot be read as a torch checkpoint ({reason}); use another copy"
        ) from error
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state:
        raise CheckpointMismatch(f"{path} holds no state dict; give an ArchScale .pth file")
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointMismatch(
                f"{path}: entry '{name}' is no tensor; give a checkpoint with a 'model' entry"
            )
        short = name
        while short.startswith(_PREFIXES):
            short = short.split(".", 1)[1]
        tensors[short] = tensor
    if EMBEDDING not in tensors:
        raise CheckpointMismatch(
            f"{path} has no tensor '{EMBEDDING}' (but '{min(tensors)}'"
            f"{_more(list(tensors))}); it is no ArchScale checkpoint"
        )
    return tensors


def _translated(
    tensors: dict[str, Tensor], config: ModelConfig, path: Path
) -> Iterator[tuple[str, Tensor]]:
    """Our names with their tensors; what was translated is taken out of `tensors`."""
    yield "embedding.weight", tensors.pop(EMBEDDING)
    head = tensors.pop(HEAD, None)
    if head is not None and not config.tie_embeddings:
        yield "head.weight", head
    yield from _taken(tensors, "transformer.ln_f.", "norm.", {"weight": "weight", "bias": "bias"})
    for layer in config.layers:
        theirs, ours = LAYER.format(layer.index), f"blocks.{layer.index}."
        for norm, name in (("norm_1", "mixer_norm"), ("norm_2", "mlp_norm")):
            parts = {f"{norm}.{part}": f"{name}.{part}" for part in ("weight", "bias")}
            yield from _taken(tensors, theirs, ours, parts)
        yield from _taken(tensors, theirs + "mlp.", ours + "mlp.", _MLP)
        if layer.kind.value in _MIXERS:
            for name, tensor in _taken(
                tensors, theirs + "attn.", ours + "mixer.", _MIXERS[layer.kind.value]
            ):
                yield name, tensor.squeeze(1) if name.endswith("conv_weight") else tensor
            continue
        yield from _taken(tensors, theirs + "attn.", ours + "mixer.", _MIXERS["attention"])
        for part in ("weight", "bias"):
            fused = tensors.pop(f"{theirs}attn.attn.{part}", None)
            if fused is None:
                continue
            if layer.kind is LayerKind.CROSS:
                yield f"{ours}mixer.q_proj.{part}", fused
                continue
            if len(fused) != (config.num_heads + 2 * config.num_kv_heads) * config.head_dim:
                raise CheckpointMismatch(
                    f"{path}: '{theirs}attn.attn.{part}' has {len(fused)} rows, unlike the first "
                    "attention layer; this package cannot express that"
                )
            queries, keys_and_values = ungrouped(fused, config)
            yield f"{ours}mixer.q_proj.{part}", queries
            yield f"{ours}mixer.kv_proj.{part}", keys_and_values


def ungrouped(fused: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """The rows of all queries, and of all keys followed by all values, from the grouped layout.

    There, a key head's query heads, its keys and its values stand together, one key head after
    the other.
    """
    group = config.num_heads // config.num_kv_heads
    rows = fused.unflatten(0, (config.num_kv_heads, group + 2, config.head_dim))
    queries, keys, values = rows.split((group, 1, 1), dim=1)
    return queries.flatten(0, 2), torch.cat((keys.flatten(0, 2), values.flatten(0, 2)))


def _taken(
    tensors: dict[str, Tensor], theirs: str, ours: str, names: dict[str, str]
) -> Iterator[tuple[str, Tensor]]:
    for old, new in names.items():
        tensor = tensors.pop(theirs + old, None)
        if tensor is not None:
            yield ours + new, tensor


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
