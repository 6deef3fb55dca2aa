"""The tensors in the safetensors files of a folder: checked first, then streamed into place.

A folder holds `model.safetensors`, or shards that `model.safetensors.index.json` names. Data is
read straight into its destination, piece by piece where the dtype or the device differs. Mapping
the files instead would let their pages count as memory of the process, next to the model itself.

Nothing here knows what a model is; the writing side is `sambay.model.weights_writer`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from sambay.errors import CheckpointMismatch

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
LENGTH_BYTES = 8  # the file begins with the length of its header, a little-endian integer
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_PIECE_BYTES = 2 << 20
_MAX_HEADER_BYTES = 100 << 20
_MAX_NAMES = 8
_PICKLED = ("*.bin", "*.pth", "*.pt", "*.ckpt")
# What is found in place of tensors when a download went wrong.
_IMPOSTORS = {
    b"version https://git-lfs": "a Git LFS pointer, not the data; run `git lfs pull` in its folder",
    b"<!doctype html": "a web page, not the data; download the file itself",
    b"<html": "a web page, not the data; download the file itself",
}


class StoredTensor(NamedTuple):
    """Where a tensor is: `offset` is that of its first byte in `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class Weights:
    """Tensors by name, of which only the headers have been read.

    source: the file or index the names come from, for messages.
    """

    def __init__(self, source: Path, tensors: dict[str, StoredTensor]) -> None:
        self.source = source
        self.tensors = tensors

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return {name: stored.shape for name, stored in self.tensors.items()}

    @torch.no_grad()
    def fill(self, name: str, target: Tensor, *, first: int = 0) -> None:
        """Copy consecutive elements of a tensor, from element `first` on, into all of `target`.

        `target` is contiguous, of any shape, dtype and device. A few MiB are needed besides it.

        Raises:
            CheckpointMismatch: the file cannot be read to the end.
        """
        stored, flat = self.tensors[name], target.detach().view(-1)
        assert first + flat.numel() <= math.prod(stored.shape), f"{name} has fewer elements"
        in_place = flat.device.type == "cpu" and flat.dtype == stored.dtype
        size = max(1, _PIECE_BYTES // stored.dtype.itemsize)
        piece = flat if in_place else torch.empty(min(size, flat.numel()), dtype=stored.dtype)
        try:
            with stored.file.open("rb", buffering=0) as file:
                file.seek(stored.offset + first * stored.dtype.itemsize)
                for start in range(0, flat.numel(), max(1, piece.numel())):
                    part = flat[start : start + piece.numel()]
                    _read_into(file, piece[: part.numel()])
                    if not in_place:
                        part.copy_(piece[: part.numel()])
        except OSError as error:
            raise CheckpointMismatch(f"{stored.file} cannot be read: {error}") from error

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored, on the CPU."""
        stored = self.tensors[name]
        value = torch.empty(stored.shape, dtype=stored.dtype)
        self.fill(name, value)
        return value

    def require(
        self, wanted: Mapping[str, tuple[int, ...]], explain: Callable[[], str] = lambda: ""
    ) -> None:
        """Compare names and shapes with those wanted; `explain` may add what they would fit.

        Raises:
            CheckpointMismatch: names the tensors that are missing, left over or misshapen.
        """
        problems = []
        if missing := sorted(wanted.keys() - self.tensors.keys()):
            problems.append(f"misses {_plural('tensor', len(missing))} {list_names(missing)}")
        if surplus := sorted(self.tensors.keys() - wanted.keys()):
            kind = "an unknown tensor" if len(surplus) == 1 else f"{len(surplus)} unknown tensors"
            problems.append(f"has {kind} {list_names(surplus)}")
        if not problems:
            wrong = [name for name, shape in wanted.items() if self.tensors[name].shape != shape]
            if wrong:
                shape, needed = self.tensors[wrong[0]].shape, wanted[wrong[0]]
                more = f", and {len(wrong) - 1} more of another shape" if len(wrong) > 1 else ""
                problems.append(f"has '{wrong[0]}' of shape {shape} where {needed} is needed{more}")
        if problems:
            hint = explain() or "it belongs to another configuration, or is incomplete"
            raise CheckpointMismatch(f"{self.source} {' and '.join(problems)}; {hint}")


def open_folder(folder: Path) -> Weights:
    """The tensors of a folder, from one file or from all shards of the index.

    Raises:
        CheckpointMismatch: no weights, only pickled ones, an index that does not agree with its
            shards, or a file that is incomplete or something else.
    """
    if (folder / WEIGHTS_FILE).exists():
        return open_file(folder / WEIGHTS_FILE)
    if (folder / INDEX_FILE).exists():
        return _open_shards(folder / INDEX_FILE)
    raise CheckpointMismatch(_why_no_weights(folder))


def open_file(path: Path) -> Weights:
    """The tensors of one safetensors file.

    Raises:
        CheckpointMismatch: the file is missing, incomplete, damaged or something else.
    """
    return Weights(path, _read_header(path))


def list_names(names: Iterable[str]) -> str:
    """The first names in quotes, and how many more there are."""
    names = list(names)
    shown = ", ".join(f"'{name}'" for name in names[:_MAX_NAMES])
    return shown + (f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else "")


def _open_shards(index: Path) -> Weights:
    weight_map = _read_index(index)
    files = sorted(set(weight_map.values()))
    if absent := [name for name in files if not (index.parent / name).exists()]:
        raise CheckpointMismatch(
            f"{index} names {_plural('file', len(absent))} {list_names(absent)} that "
            f"{'is' if len(absent) == 1 else 'are'} not there; the download is incomplete"
        )
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        found = _read_header(index.parent / name)
        if twice := sorted(found.keys() & tensors.keys()):
            raise CheckpointMismatch(
                f"{index.parent / name} repeats {_plural('tensor', len(twice))} "
                f"{list_names(twice)} of {tensors[twice[0]].file.name}; these shards do not belong "
                "together, use another copy"
            )
        tensors |= found
    lost = [
        name for name, file in weight_map.items()
        if name not in tensors or tensors[name].file.name != file
    ]  # fmt: skip
    if lost:
        raise CheckpointMismatch(
            f"{index} promises {_plural('tensor', len(lost))} {list_names(lost)} in "
            f"{weight_map[lost[0]]}, which has no such tensor; index and shards are of different "
            "origin, use another copy"
        )
    return Weights(index, tensors)


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        named = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointMismatch(
            f"{index} is no index of safetensors shards ({error}); use another copy"
        ) from error
    for file in named.values():
        if Path(file).name != file:
            raise CheckpointMismatch(
                f"{index} names the file '{file}'; shards must lie beside their index"
            )
    return named


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            _refuse_impostors(path, file)
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            begin = LENGTH_BYTES + length
            if size >= LENGTH_BYTES and length > _MAX_HEADER_BYTES:
                raise CheckpointMismatch(f"{path} is no safetensors file; use another copy")
            if size < LENGTH_BYTES or begin > size:
                raise CheckpointMismatch(
                    f"{path} has only {size:,} bytes, its header is incomplete; download or copy "
                    "it again"
                )
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors, end = _locate(path, header, begin)
    except FileNotFoundError as error:
        raise CheckpointMismatch(f"{path} does not exist; the folder is incomplete") from error
    except CheckpointMismatch:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointMismatch(
            f"{path} is damaged or no safetensors file ({error}); use another copy"
        ) from error
    if end > size:
        raise CheckpointMismatch(
            f"{path} is incomplete: {end - size:,} of its {end:,} bytes are missing; download or "
            "copy it again"
        )
    if end < size:
        raise CheckpointMismatch(
            f"{path} is damaged: {size - end:,} bytes follow its last tensor; use another copy"
        )
    return tensors


def _locate(
    path: Path, header: dict[str, dict[str, Any]], begin: int
) -> tuple[dict[str, StoredTensor], int]:
    """The tensors of a header whose data starts at byte `begin`, and the byte where it ends."""
    tensors, position = {}, begin
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise CheckpointMismatch(
                f"{path}: tensor '{name}' has dtype {entry['dtype']}; known are {', '.join(DTYPES)}"
            )
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        first, last = entry["data_offsets"]
        if first + begin != position or last - first != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"tensor '{name}' is out of place")
        tensors[name] = StoredTensor(path, dtype, shape, position)
        position = begin + last
    return tensors, position


def _refuse_impostors(path: Path, file: BinaryIO) -> None:
    start = file.read(64).lstrip().lower()
    file.seek(0)
    for beginning, what in _IMPOSTORS.items():
        if start.startswith(beginning):
            raise CheckpointMismatch(f"{path} is {what}")


def _read_into(file: Any, target: Tensor) -> None:
    left = target.view(torch.uint8).numpy().data
    while len(left):
        count = file.readinto(left)  # the system reads at most 2 GiB at once
        if not count:
            raise CheckpointMismatch(f"{file.name} became shorter while it was read")
        left = left[count:]


def _why_no_weights(folder: Path) -> str:
    pickled = sorted({path.name for pattern in _PICKLED for path in folder.glob(pattern)})
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if shards:
        return (
            f"{folder} has {list_names(shards)} but neither {WEIGHTS_FILE} nor {INDEX_FILE}; "
            "fetch the missing file from where the others came"
        )
    if pickled:
        return (
            f"{folder} has only pickled weights ({list_names(pickled)}), which can run code when "
            "they are read; get the safetensors files, or use `sambay convert`"
        )
    return f"{folder} has no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}"


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{count} {noun}s"
