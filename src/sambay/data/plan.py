"""Which documents go into which shards, decided before the first token is written.

A unit is a run of consecutive documents with about equal amounts of text; it becomes one training
shard and, if it has such documents, one validation shard. Units do not depend on each other, so
they can be written in any order, by any number of processes, and again after a kill.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sambay.data.scan import Scan, are_validation, fraction_of
from sambay.data.settings import PrepareSettings
from sambay.data.sources import Listing, SourceFile
from sambay.data.tokenizer import Tokenizer
from sambay.errors import DataError
from sambay.files import atomic_write

PLAN_FORMAT = 1
_DEFAULT_SHARDS = 64
_SMALLEST_SHARD = 1 << 20
_LARGEST_SHARD = 256 << 20
_ESTIMATE_BYTES = 1 << 20
_USUAL_BYTES_PER_TOKEN = 4


class Segment(NamedTuple):
    """Documents of one file: read from `offset`, pass over `skip`, take `count`."""

    file: int
    offset: int
    skip: int
    count: int


class Unit(NamedTuple):
    """One task. `train` and `validation` are shard numbers, or None if there is no document for it.

    `digest` stands for the hashes of all its documents: a changed file is noticed.
    """

    segments: tuple[Segment, ...]
    train: int | None
    validation: int | None
    digest: str


@dataclass(frozen=True)
class Plan:
    """Everything a run needs to write the shards, or to continue writing them."""

    settings: dict[str, Any]
    tokenizer_sha256: str
    files: tuple[SourceFile, ...]
    units: tuple[Unit, ...]
    sources: tuple[dict[str, Any], ...]
    counts: dict[str, int]
    unreadable: tuple[str, ...]
    text_bytes: int

    def write(self, path: Path) -> None:
        content = {"format": PLAN_FORMAT, **vars(self)}
        with atomic_write(path) as file:
            # Escaped, since names of files need not be UTF-8.
            file.write(json.dumps(content, ensure_ascii=True).encode())

    @classmethod
    def read(cls, path: Path) -> Plan:
        """The plan of unfinished work.

        Raises:
            DataError: damaged, or written by another version.
        """
        try:
            content = json.loads(path.read_bytes())
            if content.pop("format") != PLAN_FORMAT:
                raise ValueError("another format version")
            content["files"] = tuple(SourceFile(*file) for file in content["files"])
            content["units"] = tuple(
                Unit(tuple(Segment(*segment) for segment in segments), *rest)
                for segments, *rest in content["units"]
            )
            for key in ("sources", "unreadable"):
                content[key] = tuple(content[key])
            return cls(**content)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{path}: the record of unfinished work cannot be read ({error}); "
                "start over with --force"
            ) from error


def make_plan(
    listing: Listing, scan: Scan, settings: PrepareSettings, tokenizer: Tokenizer
) -> Plan:
    """The plan for these documents."""
    validation = are_validation(scan.hashes, settings.validation_fraction)
    ends = np.cumsum(scan.sizes)
    # A document belongs to the stretch of text in which it begins; no stretch is left empty.
    stretch = (ends - scan.sizes) // _unit_bytes(scan, settings, tokenizer)
    borders = np.flatnonzero(np.diff(stretch)) + 1
    starts = [0, *borders.tolist()]
    stops = [*borders.tolist(), len(stretch)]
    train_number = validation_number = 0
    units = []
    for start, stop in zip(starts, stops, strict=True):
        held_out = int(validation[start:stop].sum())
        units.append(
            Unit(
                segments=_segments(scan, start, stop),
                train=train_number if held_out < stop - start else None,
                validation=validation_number if held_out else None,
                digest=digest(scan.hashes[start:stop]),
            )
        )
        train_number += held_out < stop - start
        validation_number += held_out > 0
    return Plan(
        settings=settings.record(),
        tokenizer_sha256=tokenizer.sha256,
        files=listing.files,
        units=tuple(units),
        sources=describe_sources(listing, scan),
        counts=scan.counts,
        unreadable=scan.unreadable,
        text_bytes=scan.text_bytes,
    )


def describe_sources(listing: Listing, scan: Scan) -> tuple[dict[str, Any], ...]:
    """Name, amount and fingerprint of each source, without where it lay or when it was written."""
    source_of_file = np.array([file.source for file in listing.files], np.int64)
    source = source_of_file[scan.files]
    order = np.argsort(source, kind="stable")
    borders = np.searchsorted(source[order], np.arange(len(listing.sources) + 1))
    described = []
    for root, (start, stop) in zip(listing.sources, pairwise(borders.tolist()), strict=True):
        own = order[start:stop]
        name = root.name.encode("utf-8", "backslashreplace").decode()
        described.append(
            {
                "name": name,
                "documents": stop - start,
                "bytes": int(scan.sizes[own].sum()),
                "digest": digest(scan.hashes[own]),
            }
        )
    return tuple(described)


def digest(hashes: np.ndarray) -> str:
    """A fingerprint of documents in their order."""
    return hashlib.sha256(np.ascontiguousarray(hashes, "<u8").tobytes()).hexdigest()


def _unit_bytes(scan: Scan, settings: PrepareSettings, tokenizer: Tokenizer) -> int:
    if settings.shard_tokens is None:
        return min(max(scan.text_bytes // _DEFAULT_SHARDS, _SMALLEST_SHARD), _LARGEST_SHARD)
    size = tokens = 0
    for piece in scan.sample:
        size += len(piece.encode())
        tokens += len(tokenizer.encode_array(piece))
        if size >= _ESTIMATE_BYTES:
            break
    if not tokens:  # all documents are held out, so there is no sample
        size, tokens = _USUAL_BYTES_PER_TOKEN, 1
    return max(1, settings.shard_tokens * size // max(1, tokens))


def _segments(scan: Scan, start: int, stop: int) -> tuple[Segment, ...]:
    files, offsets = scan.files[start:stop], scan.offsets[start:stop]
    firsts = [0, *(np.flatnonzero(np.diff(files)) + 1).tolist(), stop - start]
    segments = []
    for first, last in pairwise(firsts):
        skip, document = 0, start + first
        # Several documents cut from one record share its offset.
        while (
            document - skip > 0
            and scan.files[document - skip - 1] == files[first]
            and scan.offsets[document - skip - 1] == offsets[first]
        ):
            skip += 1
        segments.append(Segment(int(files[first]), int(offsets[first]), skip, last - first))
    return tuple(segments)


def check_splits(scan: Scan, fraction: float) -> None:
    """Refuse a division that leaves a split empty.

    Raises:
        DataError: names a fraction that avoids it.
    """
    held_out = int(are_validation(scan.hashes, fraction).sum())
    total = len(scan.hashes)
    if fraction and not held_out:
        # Above the smallest hash there is one document in validation; rounding must not undo it.
        enough = fraction_of(int(scan.hashes.min())) * 1.001 + 1e-6
        raise DataError(
            f"no document of {total} falls into the validation split; use --validation-fraction "
            f"{enough:.6f} or more (0 for none), or --max-document-bytes to cut long texts"
        )
    if held_out == total and fraction < 1:
        raise DataError(
            f"all {total} documents fall into the validation split; lower --validation-fraction "
            "(0 for none), or cut long texts with --max-document-bytes"
        )
