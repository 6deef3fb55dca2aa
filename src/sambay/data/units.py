"""Writing one unit: its documents become tokens, its tokens become shards."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sambay.data.documents import ReadingRules, UnreadableFileError, read_documents
from sambay.data.journal import Journal
from sambay.data.manifest import DTYPES, TRAIN, VALIDATION, Shard
from sambay.data.plan import Unit, digest
from sambay.data.scan import content_hash, is_validation
from sambay.data.sources import SourceFile
from sambay.data.tokenizer import Tokenizer
from sambay.data.workers import Advance
from sambay.errors import DataError
from sambay.files import atomic_write

_REPORT_BYTES = 1 << 20


class UnitContext(NamedTuple):
    """What every worker needs to write units."""

    out: Path
    files: tuple[SourceFile, ...]
    reading: ReadingRules
    validation_fraction: float
    eos_token: str
    tokenizer_sha256: str


class UnitTask(NamedTuple):
    number: int
    unit: Unit


class _Split:
    """The documents of one shard, gathered in memory."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []
        self.lengths: list[int] = []
        self.bytes = 0


def write_unit(context: UnitContext, task: UnitTask, advance: Advance) -> dict[str, Any]:
    """Write the shards of a unit and its record; returns the shards as plain values, by split.

    `advance` counts bytes of text.

    Raises:
        DataError: the documents are not those of the plan any more.
        WriteFailed: the disk is full or refuses.
    """
    journal = Journal(context.out)
    tokenizer = _tokenizer(journal.folder, context.eos_token, context.tokenizer_sha256)
    dtype = dtype_name(tokenizer.vocab_size)
    splits = {TRAIN: _Split(), VALIDATION: _Split()}
    hashes = []
    eos = np.array([tokenizer.eos_id], dtype)
    unreported = 0
    for text in _texts(context, task.unit):
        data = text.encode()
        content = content_hash(data)
        hashes.append(content)
        held_out = is_validation(content, context.validation_fraction)
        split = splits[VALIDATION if held_out else TRAIN]
        tokens = tokenizer.encode_array(text).astype(dtype)
        split.parts += [tokens, eos]
        split.lengths.append(len(tokens) + 1)
        split.bytes += len(data)
        unreported += len(data)
        if unreported >= _REPORT_BYTES:
            advance(unreported)
            unreported = 0
    if digest(np.array(hashes, np.uint64)) != task.unit.digest:
        raise _changed(context, task.unit)
    numbers = {TRAIN: task.unit.train, VALIDATION: task.unit.validation}
    result: dict[str, Any] = {}
    for name, split in splits.items():
        number = numbers[name]
        assert (number is None) == (not split.parts)
        if number is not None:
            tokens = np.concatenate(split.parts)
            # The check that makes bits per byte exact, over everything that is written.
            exact = tokenizer.count_bytes(tokens) == split.bytes if tokenizer.byte_level else False
            shard = _write_shard(journal.folder, f"{name}/{number:05d}.bin", tokens, split)
            result[name] = {"shard": shard._asdict(), "exact": exact}
    files = []
    for part in result.values():
        shard = Shard(**part["shard"])
        files += [shard.file, shard.index_file]
    journal.complete_unit(task.number, result, files)
    advance(unreported)
    return result


def dtype_name(vocab_size: int) -> str:
    """The smallest stored type that holds every token id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def _write_shard(folder: Path, file: str, tokens: np.ndarray, split: _Split) -> _ShardValues:
    ends = np.cumsum(np.array(split.lengths, np.int64))
    index_file = file.removesuffix(".bin") + ".idx"
    token_data = tokens.astype(tokens.dtype.newbyteorder("<")).tobytes()
    assert len(token_data) == int(ends[-1]) * DTYPES[str(tokens.dtype)]
    sums = []
    for name, data in ((file, token_data), (index_file, ends.astype("<i8").tobytes())):
        with atomic_write(folder / name) as stream:
            stream.write(data)
        sums.append(hashlib.sha256(data).hexdigest())
    return _ShardValues(file, len(tokens), len(ends), split.bytes, *sums)


class _ShardValues(NamedTuple):
    file: str
    tokens: int
    documents: int
    bytes: int
    sha256: str
    index_sha256: str


def _texts(context: UnitContext, unit: Unit) -> Iterator[str]:
    for segment in unit.segments:
        file = context.files[segment.file]
        ignored: Counter[str] = Counter()
        documents = read_documents(file, context.reading, ignored, offset=segment.offset)
        try:
            for document in islice(documents, segment.skip, segment.skip + segment.count):
                yield document.text
        except UnreadableFileError as error:
            raise _changed(context, unit, str(error)) from error


def _changed(context: UnitContext, unit: Unit, reason: str = "") -> DataError:
    names = [context.files[segment.file].path for segment in unit.segments]
    which = names[0] if len(names) == 1 else f"one of {names[0]} to {names[-1]}"
    return DataError(
        f"{reason or which}: changed while it was being prepared; "
        "let the sources rest and start over with --force"
    )


@lru_cache(maxsize=1)
def _tokenizer(folder: Path, eos_token: str, sha256: str) -> Tokenizer:
    tokenizer = Tokenizer.load(folder, eos_token)
    assert tokenizer.sha256 == sha256
    return tokenizer
