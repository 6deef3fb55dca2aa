"""The first pass over the sources: the hash, length and place of every document, and a sample.

Knowing all documents before the first token is written makes everything after it simple: what is
unusable is reported at once, the split and the shards are known in advance, shards are independent
tasks, and the tokenizer's sample does not depend on the order of files.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from sambay.data.documents import ReadingRules, UnreadableFileError, read_documents
from sambay.data.sources import Listing, SourceFile
from sambay.data.tokenizer import cut_for_encoding
from sambay.data.workers import Advance, run_tasks
from sambay.errors import DataError

_SAMPLE_PIECE = 1 << 16
_TASK_BYTES = 4 << 20
_TASK_FILES = 256
_HASHES = 1 << 64
# More is collected than needed, since the share to keep is estimated from sizes on disk.
_SAMPLE_MARGIN = 1.5
# A field name in the counts tells the user what a record without text does have.
_FIELD = "field:"


@dataclass
class FileScan:
    """What one file holds; arrays have one entry per document."""

    hashes: np.ndarray
    sizes: np.ndarray
    offsets: np.ndarray
    counts: Counter[str] = field(default_factory=Counter)
    sample: list[tuple[int, str]] = field(default_factory=list)
    unreadable: str = ""


@dataclass(frozen=True)
class Scan:
    """All documents in their order: uint64 hashes, UTF-8 sizes, where they are, what was left out.

    `files[i]` is the number of the file of document i in the listing, `offsets[i]` where it begins
    there. `sample` holds pieces of training texts in an order that depends on their content only.
    """

    hashes: np.ndarray
    sizes: np.ndarray
    files: np.ndarray
    offsets: np.ndarray
    counts: dict[str, int]
    unreadable: tuple[str, ...]
    sample: tuple[str, ...]

    @property
    def text_bytes(self) -> int:
        return int(self.sizes.sum())


class ScanRules(NamedTuple):
    """How to read, and which share of all pieces of training texts to keep for the sample."""

    reading: ReadingRules
    validation_fraction: float
    sample_share: float


def scan(
    listing: Listing,
    reading: ReadingRules,
    validation_fraction: float,
    sample_bytes: int,
    workers: int,
    advance: Advance,
) -> Scan:
    """Read every file once; `advance` counts bytes on disk.

    Raises:
        DataError: a source has nothing usable (says why), or a format needs a missing package.
    """
    share = min(1.0, _SAMPLE_MARGIN * sample_bytes / max(1, listing.size))
    rules = ScanRules(reading, validation_fraction, share)
    tasks = _group(listing.files)
    results: list[list[FileScan]] = [[]] * len(tasks)
    for number, scans in run_tasks(_scan_files, rules, tasks, workers, advance):
        results[number] = scans
    scans = [scan for group in results for scan in group]
    counts = Counter(listing.skipped)
    for one in scans:
        counts.update({key: n for key, n in one.counts.items() if not key.startswith(_FIELD)})
    unreadable = [*listing.unreadable, *(one.unreadable for one in scans if one.unreadable)]
    _check_sources(listing, scans, reading)
    hashes = np.concatenate([one.hashes for one in scans])
    counts["unreadable_files"] = len(unreadable)
    counts["files"] = sum(len(one.hashes) > 0 for one in scans)
    counts["documents"] = len(hashes)
    counts["duplicate_documents"] = len(hashes) - len(np.unique(hashes))
    return Scan(
        hashes=hashes,
        sizes=np.concatenate([one.sizes for one in scans]),
        files=np.repeat(np.arange(len(scans)), [len(one.hashes) for one in scans]),
        offsets=np.concatenate([one.offsets for one in scans]),
        counts=dict(sorted(counts.items())),
        unreadable=tuple(unreadable),
        sample=_choose([pair for one in scans for pair in one.sample], sample_bytes),
    )


def content_hash(data: bytes) -> int:
    """The 64-bit hash of a document's UTF-8: it decides the split, so equal texts stay together."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def is_validation(content: int, fraction: float) -> bool:
    """Whether a document with this hash belongs to the validation split."""
    return content < round(fraction * _HASHES)


def are_validation(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """`is_validation` of many."""
    limit = round(fraction * _HASHES)
    # 2^64 itself is no uint64, and all hashes are below it.
    return hashes < np.uint64(limit) if limit < _HASHES else np.ones(len(hashes), bool)


def fraction_of(content: int) -> float:
    """The validation fraction above which a document with this hash is in the validation split."""
    return content / _HASHES


def _group(files: Sequence[SourceFile]) -> list[list[SourceFile]]:
    """Consecutive files in tasks large enough that handing them out costs nothing."""
    tasks: list[list[SourceFile]] = []
    size = _TASK_BYTES
    for file in files:
        if size >= _TASK_BYTES or len(tasks[-1]) >= _TASK_FILES:
            tasks.append([])
            size = 0
        tasks[-1].append(file)
        size += file.size
    return tasks


def _scan_files(rules: ScanRules, files: list[SourceFile], advance: Advance) -> list[FileScan]:
    results = []
    for file in files:
        meter = _Meter(advance)
        results.append(_scan_file(rules, file, meter))
        meter.finish(file.size)
    return results


class _Meter:
    """Reports a file's progress in steps, and in the end exactly its size."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._read = self._reported = 0

    def count(self, size: int) -> None:
        self._read += size
        if self._read - self._reported >= _TASK_BYTES:
            self._advance(self._read - self._reported)
            self._reported = self._read

    def finish(self, size: int) -> None:
        self._advance(size - self._reported)


def _scan_file(rules: ScanRules, file: SourceFile, meter: _Meter) -> FileScan:
    hashes, sizes, offsets = array("Q"), array("q"), array("q")
    counts: Counter[str] = Counter()
    sample: list[tuple[int, str]] = []
    try:
        for document in read_documents(file, rules.reading, counts, on_read=meter.count):
            data = document.text.encode()
            content = content_hash(data)
            hashes.append(content)
            sizes.append(len(data))
            offsets.append(document.offset)
            if not is_validation(content, rules.validation_fraction):
                _sample(document.text, content, rules.sample_share, sample)
    except UnreadableFileError as error:
        # Half of a damaged file is not used: which half would depend on buffers and versions.
        none = np.empty(0, np.int64)
        return FileScan(none.astype(np.uint64), none, none, unreadable=str(error))
    return FileScan(
        np.frombuffer(hashes, np.uint64),
        np.frombuffer(sizes, np.int64),
        np.frombuffer(offsets, np.int64),
        counts,
        sample,
    )


def _sample(text: str, content: int, share: float, sample: list[tuple[int, str]]) -> None:
    pieces = list(cut_for_encoding(text, _SAMPLE_PIECE))
    for piece in pieces:
        # Mixed once more, since the hash itself has already decided the split.
        basis = content if len(pieces) == 1 else content_hash(piece.encode())
        key = content_hash(basis.to_bytes(8, "little"))
        if key < share * _HASHES:
            sample.append((key, piece))


def _choose(sample: list[tuple[int, str]], budget: int) -> tuple[str, ...]:
    """The pieces with the smallest keys, each once, of `budget` bytes in all."""
    chosen, size = [], 0
    for _, piece in sorted(dict(sample).items()):
        if size >= budget:
            break
        chosen.append(piece)
        size += len(piece.encode())
    return tuple(chosen)


def _check_sources(listing: Listing, scans: Sequence[FileScan], reading: ReadingRules) -> None:
    of_source: list[list[FileScan]] = [[] for _ in listing.sources]
    for file, one in zip(listing.files, scans, strict=True):
        of_source[file.source].append(one)
    for source, own in zip(listing.sources, of_source, strict=True):
        # A source whose files all belong to an earlier one too is no mistake.
        if not own or any(len(scan.hashes) for scan in own):
            continue
        counts: Counter[str] = Counter()
        for scan in own:
            counts.update(scan.counts)
        damaged = [scan.unreadable for scan in own if scan.unreadable]
        fields = [key.removeprefix(_FIELD) for key in counts if key.startswith(_FIELD)]
        reasons = [f"{n} {key}" for key, n in sorted(counts.items()) if not key.startswith(_FIELD)]
        if damaged:
            reasons.append(f"{len(damaged)} unreadable, such as {damaged[0]}")
        remedy = "give files of UTF-8 text, JSON lines or Parquet"
        if fields:
            remedy = (
                f"there is no text in field {reading.text_field!r}; choose one of "
                f"{', '.join(map(repr, sorted(fields)))} with --text-field"
            )
        raise DataError(f"source {source}: nothing usable ({', '.join(reasons)}); {remedy}")
