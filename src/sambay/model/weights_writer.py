"""Writing tensors as safetensors files one after the other, so that none but one is in memory.

The format is a length, a JSON header and the data; shapes and dtypes must be known before the first
value is. Larger checkpoints become shards with an index, as elsewhere in the safetensors world.
"""

from __future__ import annotations

import errno
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sambay.errors import ConfigError
from sambay.files import WriteFailed, write_json
from sambay.model.weights import DTYPES, INDEX_FILE, LENGTH_BYTES, WEIGHTS_FILE

DEFAULT_SHARD_BYTES = 5_000_000_000

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PIECE_BYTES = 8 << 20
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class TensorPlan(NamedTuple):
    """A tensor to write: `parts` makes its values when it is their turn.

    The elements of the parts follow each other; they may have any shape, dtype and device.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Sequence[Tensor]]

    @property
    def nbytes(self) -> int:
        """The bytes of the tensor in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_tensor(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> TensorPlan:
    """The plan for a tensor that is there already."""
    return TensorPlan(name, dtype or tensor.dtype, tuple(tensor.shape), lambda: (tensor,))


def write_folder(
    folder: Path,
    plans: Sequence[TensorPlan],
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    advance: Callable[[int], object] = lambda count: None,
) -> None:
    """Write model.safetensors, or shards of at most `max_shard_bytes` of data and their index.

    A larger single tensor gets a shard of its own. `advance` is told of bytes as they are written.

    Raises:
        WriteFailed: the operating system refused.
    """
    shards = _split(plans, max_shard_bytes)
    if len(shards) <= 1:
        write_file(folder / WEIGHTS_FILE, plans, advance)
        return
    stem = WEIGHTS_FILE.removesuffix(".safetensors")
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, shard, advance)
        weight_map |= {plan.name: file for plan in shard}
    total_size = sum(plan.nbytes for plan in plans)
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX_FILE, index)


def write_file(
    path: Path, plans: Iterable[TensorPlan], advance: Callable[[int], object] = lambda count: None
) -> None:
    """Write one safetensors file; not atomic, which is the folder's business.

    Raises:
        WriteFailed: the operating system refused.
    """
    # Wider elements first keep every tensor aligned to its element size.
    ordered = sorted(plans, key=lambda plan: -plan.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for plan in ordered:
        assert plan.name not in header, f"two tensors are called {plan.name}"
        header[plan.name] = {
            "dtype": _DTYPE_NAMES[plan.dtype],
            "shape": plan.shape,
            "data_offsets": (position, position + plan.nbytes),
        }
        position += plan.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    try:
        with path.open("wb", buffering=0) as file:
            _write_all(file, len(text).to_bytes(LENGTH_BYTES, "little") + text)
            for plan in ordered:
                _write_tensor(file, plan, advance)
    except OSError as error:
        full = error.errno == errno.ENOSPC
        reason = "the disk is full; free some space and run the command again" if full else error
        raise WriteFailed(f"cannot write {path}: {reason}") from error


def parse_size(text: str | int) -> int:
    """The bytes meant by "5GB" (10^9), "512MiB" (2^20) or a plain number.

    Raises:
        ConfigError: something else, or nothing at all.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    size = int(float(match[1]) * _UNITS.get(match[2].upper(), 0)) if match else 0
    if size < 1:
        raise ConfigError(f"'{text}' is not a size of 1 byte or more; write for example 5GB")
    return size


def _split(plans: Sequence[TensorPlan], max_bytes: int) -> list[list[TensorPlan]]:
    shards: list[list[TensorPlan]] = []
    size = 0
    for plan in plans:
        if not shards or size + plan.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(plan)
        size += plan.nbytes
    return shards


@torch.no_grad()
def _write_tensor(file: io.FileIO, plan: TensorPlan, advance: Callable[[int], object]) -> None:
    count = max(1, _PIECE_BYTES // plan.dtype.itemsize)
    left = plan.nbytes
    for part in plan.parts():
        flat = part.detach().reshape(-1)
        for start in range(0, flat.numel(), count):
            piece = flat[start : start + count].to(device="cpu", dtype=plan.dtype).contiguous()
            _write_all(file, piece.view(torch.uint8).numpy().data)
            advance(piece.nbytes)
            left -= piece.nbytes
    assert left == 0, f"the parts of {plan.name} do not fill its shape"


def _write_all(file: io.FileIO, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while len(left):
        left = left[file.write(left) :]  # the system writes at most 2 GiB at once
