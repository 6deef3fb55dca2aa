"""Checkpoints with random weights of any size, written tensor by tensor.

For trying a machine, a server or a port with the real shapes where the real weights are not at
hand. The values are those of `initialise`: a function of seed and tensor name alone, the same in
both layouts.
"""

from __future__ import annotations

import enum
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sambay.files import WriteFailed, write_json
from sambay.hf import official
from sambay.hf.official_config import extend
from sambay.model.folder import (
    CONFIG_FILE,
    config_values,
    meta_model,
    stored_name,
    stored_tensors,
)
from sambay.model.init import value_makers
from sambay.model.publish import publish_folder
from sambay.model.weights_writer import DEFAULT_SHARD_BYTES, TensorPlan, write_folder
from sambay.spec import InitScheme, ModelConfig


class Layout(enum.StrEnum):
    """The two kinds of model folders."""

    NATIVE = "native"
    OFFICIAL = "official"


def plan_random(
    config: ModelConfig,
    layout: Layout,
    *,
    dtype: torch.dtype,
    seed: int = 0,
    scheme: InitScheme = InitScheme.MUP_RELEASED,
) -> tuple[dict[str, Any], list[TensorPlan]]:
    """The content of config.json and the tensors to write; no value is drawn yet.

    Raises:
        ConfigError: the official class cannot express this configuration, with the reason.
    """
    values = (
        config_values(config, dtype)
        if layout is Layout.NATIVE
        else extend(config, extra={}, dtype=dtype)
    )
    model = meta_model(config, dtype)
    makers = value_makers(model, scheme, seed)
    tensors = stored_tensors(model)
    if layout is Layout.OFFICIAL:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return values, official.plan_tensors(config, shapes, dtype, lambda name: makers[name]())

    def plan(name: str, tensor: torch.Tensor) -> TensorPlan:
        return TensorPlan(
            stored_name(name), tensor.dtype, tuple(tensor.shape), lambda: (makers[name](),)
        )

    return values, [plan(name, tensor) for name, tensor in tensors.items()]


def write_random_checkpoint(
    folder: Path,
    config: ModelConfig,
    layout: Layout,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    scheme: InitScheme = InitScheme.MUP_RELEASED,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    advance: Callable[[int], object] = lambda count: None,
) -> None:
    """Write a folder with random weights, complete or not at all, into a place that is free.

    In memory is one tensor at a time, in float32. `advance` is told of bytes as they are written.

    Raises:
        ConfigError: the configuration does not fit the layout.
        WriteFailed: something is in the way, or the disk is too small.
    """
    values, plans = plan_random(config, layout, dtype=dtype, seed=seed, scheme=scheme)
    require_free_place(folder, sum(plan.nbytes for plan in plans))
    with publish_folder(folder) as new:
        write_json(new / CONFIG_FILE, values)
        write_folder(new, plans, max_shard_bytes=max_shard_bytes, advance=advance)


def require_free_place(folder: Path, needed: int) -> None:
    """Refuse to replace anything, or to fill a disk.

    Raises:
        WriteFailed: `folder` exists and is not empty, or has less than `needed` bytes free.
    """
    if folder.is_dir() and not any(folder.iterdir()):
        pass
    elif folder.exists():
        raise WriteFailed(f"{folder} exists already; remove it or choose another folder")
    existing = next(parent for parent in folder.absolute().parents if parent.exists())
    if not existing.is_dir():
        raise WriteFailed(f"{existing} is a file; choose another folder than {folder}")
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise WriteFailed(
            f"{folder} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; free some space "
            "or choose another disk"
        )
