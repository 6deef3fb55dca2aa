"""Records of packed token ids in binary files: MDS shards and NumPy archives.

An MDS shard (the format of MosaicML's streaming library) is: uint32 number of samples; uint32
offsets of all samples and of the end; a JSON description of the columns; the samples. A sample is
the uint32 sizes of its columns of variable size, then the values of all columns in order. An array
column is written `ndarray[:dtype[:shape]]`; a dtype that is not named there is a byte before the
values (its bits), and a shape is a byte (4 times the number of axes, plus the log2 of the bytes of
each) and the axes. Everything is little-endian.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from sambay.data.records import IDS, INDICES

_DTYPES = {8: "u1", 9: "i1", 16: "u2", 17: "i2", 32: "u4", 33: "i4", 64: "u8", 65: "i8"}
_NAMES = {"uint8": "u1", "int8": "i1", "uint16": "u2", "int16": "i2"} | {
    "uint32": "u4", "int32": "i4", "uint64": "u8", "int64": "i8",
}  # fmt: skip


class DamagedError(ValueError):
    """The bytes are not those of the format."""


def read_mds(data: bytes, first: int) -> Iterator[dict[str, Any]]:
    """The samples of a shard from number `first` on: arrays, and what else is text.

    Columns of other encodings than arrays, texts and JSON are left out.

    Raises:
        DamagedError: not an MDS shard, or a cut one.
    """
    try:
        count = int(np.frombuffer(data, "<u4", 1)[0])
        offsets = np.frombuffer(data, "<u4", count + 1, 4).tolist()
        about = json.loads(data[8 + 4 * count : offsets[0]])
        columns = list(
            zip(
                about["column_names"], about["column_encodings"], about["column_sizes"], strict=True
            )
        )
        if offsets[-1] > len(data):
            raise DamagedError("the shard ends before its last sample")
        for number in range(first, count):
            yield _sample(data[offsets[number] : offsets[number + 1]], columns)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DamagedError(f"not a complete MDS shard ({error})") from error


def read_npz(data: bytes, first: int) -> Iterator[dict[str, Any]]:
    """The one record of an archive with arrays `input_ids` and `indices`.

    Raises:
        DamagedError: not an archive of arrays.
    """
    if first:
        return
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            yield {name: arrays[name] for name in (IDS, INDICES) if name in arrays}
    except (ValueError, zipfile.BadZipFile) as error:
        raise DamagedError(f"not an archive of arrays ({error})") from error


def _sample(data: bytes, columns: list[tuple[str, str, int | None]]) -> dict[str, Any]:
    variable = sum(size is None for _, _, size in columns)
    sizes = iter(np.frombuffer(data, "<u4", variable).tolist())
    at, values = 4 * variable, {}
    for name, encoding, fixed in columns:
        size = next(sizes) if fixed is None else fixed
        value = data[at : at + size]
        if len(value) < size:
            raise DamagedError(f"column {name} is cut")
        at += size
        kind, _, rest = encoding.partition(":")
        if kind == "ndarray":
            values[name] = _array(value, rest)
        elif kind == "str":
            values[name] = value.decode()
        elif kind == "json":
            values[name] = json.loads(value)
    return values


def _array(data: bytes, description: str) -> np.ndarray:
    dtype_name, _, shape_text = description.partition(":")
    at = 0
    if dtype_name:
        dtype = _NAMES[dtype_name]
    else:
        dtype, at = _DTYPES[data[0]], 1
    if shape_text:
        shape = [int(axis) for axis in shape_text.split(",")]
    else:
        axes, width = data[at] >> 2, 1 << (data[at] & 3)
        shape = np.frombuffer(data, f"<u{width}", axes, at + 1).tolist()
        at += 1 + axes * width
    return np.frombuffer(data, f"<{dtype}", math.prod(shape), at).reshape(shape)
