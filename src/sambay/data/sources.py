"""Which files the given sources contain, in an order that depends on their names alone."""

from __future__ import annotations

import fnmatch
import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sambay.errors import DataError

TEXT, JSONL, PARQUET, MDS, NPZ = "text", "jsonl", "parquet", "mds", "npz"
PLAIN, GZIP, ZSTD = "", "gzip", "zstd"

_COMPRESSION = {".gz": GZIP, ".zst": ZSTD, ".zstd": ZSTD}
_KINDS = {".jsonl": JSONL, ".ndjson": JSONL, ".parquet": PARQUET, ".mds": MDS, ".npz": NPZ}


class SourceFile(NamedTuple):
    """One file to read; `source` is the position of the source it came from in `Listing.sources`.

    Size (bytes) and modification time (ns) tell a resumed run whether the file has changed.
    """

    path: str
    kind: str
    compression: str
    size: int
    mtime_ns: int
    source: int


@dataclass(frozen=True)
class Listing:
    """The sources (resolved, sorted), their files (sorted by path) and what was left out."""

    sources: tuple[Path, ...]
    files: tuple[SourceFile, ...]
    skipped: dict[str, int]
    unreadable: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes on disk of all files."""
        return sum(file.size for file in self.files)


def list_files(
    sources: Sequence[Path], *, include: Sequence[str], exclude: Sequence[str], out: Path
) -> Listing:
    """All files of `sources`, each once, sorted by path.

    A file given by name is always taken. In a folder, names that start with a dot and
    `__pycache__` are left out, so is the folder `out`; `include` and `exclude` are glob patterns
    compared with the path below the folder, with the name, and with each parent's name.
    Links to files are followed, links to folders are not (they are counted).

    Raises:
        DataError: a source does not exist, is neither file nor folder, is or lies in `out`, or is
            a folder without any file to take.
    """
    out = out.resolve()
    roots = sorted({_resolve(source, out) for source in sources}, key=os.fsencode)
    skipped: Counter[str] = Counter()
    unreadable: list[str] = []
    found: dict[str, SourceFile] = {}
    for number, root in enumerate(roots):
        if root.is_file():
            paths = [str(root)]
        else:
            paths = _walk(root, include, exclude, out, skipped, unreadable)
        usable = 0
        for path in paths:
            try:
                status = os.stat(path)
            except OSError as error:
                unreadable.append(f"{path}: {error.strerror}")
                continue
            if not stat.S_ISREG(status.st_mode):
                skipped["special_files"] += 1
                continue
            usable += 1
            identity = os.path.realpath(path) if os.path.islink(path) else path
            kind, compression = classify(path)
            file = SourceFile(path, kind, compression, status.st_size, status.st_mtime_ns, number)
            # A file reached twice (overlapping sources, links) is read once, under its first name.
            if identity not in found:
                found[identity] = file
            else:
                skipped["repeated_files"] += 1
                if os.fsencode(path) < os.fsencode(found[identity].path):
                    found[identity] = file
        if not usable:
            raise DataError(_explain_empty(root, include, exclude, unreadable))
    files = tuple(sorted(found.values(), key=lambda file: os.fsencode(file.path)))
    return Listing(tuple(roots), files, dict(sorted(skipped.items())), tuple(sorted(unreadable)))


def classify(path: str) -> tuple[str, str]:
    """The kind and compression ("", "gzip", "zstd") a name implies.

    Compressed `.json` files are taken as one JSON object a line, which is how corpora publish
    them; a plain `.json` file is a text like any other.
    """
    stem, suffix = os.path.splitext(path.lower())
    compression = _COMPRESSION.get(suffix, PLAIN)
    if compression:
        suffix = os.path.splitext(stem)[1]
        if suffix == ".json":
            return JSONL, compression
    return _KINDS.get(suffix, TEXT), compression


def matches(relative: str, patterns: Sequence[str]) -> bool:
    """Whether the path, or the name or path of one of its parents, fits one of the patterns."""
    parts = relative.split("/")
    for end in range(1, len(parts) + 1):
        path = "/".join(parts[:end])
        for pattern in patterns:
            if fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(parts[end - 1], pattern):
                return True
    return False


def _resolve(source: Path, out: Path) -> Path:
    try:
        root = source.resolve(strict=True)
    except OSError as error:
        raise DataError(
            f"source {source}: {error.strerror or 'cannot be found'}; check the path"
        ) from error
    if not root.is_file() and not root.is_dir():
        raise DataError(f"source {source} is neither a file nor a folder; give files or folders")
    if root == out or out in root.parents:
        raise DataError(
            f"source {source} is or lies in the output folder {out}; choose another --out"
        )
    return root


def _walk(
    root: Path,
    include: Sequence[str],
    exclude: Sequence[str],
    out: Path,
    skipped: Counter[str],
    unreadable: list[str],
) -> list[str]:
    def note(error: OSError) -> None:
        unreadable.append(f"{error.filename}: {error.strerror}")

    paths: list[str] = []
    for folder, folders, names in os.walk(root, onerror=note):
        below = os.path.relpath(folder, root).replace(os.sep, "/")
        prefix = "" if below == "." else below + "/"
        kept = []
        for name in folders:
            path = os.path.join(folder, name)
            if name.startswith(".") or name == "__pycache__":
                skipped["hidden"] += 1
            elif os.path.islink(path):
                skipped["folder_links"] += 1
            elif matches(prefix + name, exclude):
                skipped["excluded"] += 1
            elif Path(path) != out:
                kept.append(name)
        folders[:] = kept
        for name in names:
            if name.startswith("."):
                skipped["hidden"] += 1
            elif matches(prefix + name, exclude) or (
                include and not matches(prefix + name, include)
            ):
                skipped["excluded"] += 1
            else:
                paths.append(os.path.join(folder, name))
    return paths


def _explain_empty(
    root: Path, include: Sequence[str], exclude: Sequence[str], unreadable: Sequence[str]
) -> str:
    if unreadable:
        return f"source {root}: no readable file; {unreadable[0]}; check the permissions"
    if include or exclude:
        return f"source {root}: no file passes the patterns; change --include and --exclude"
    return f"source {root}: the folder holds no file (hidden ones are not read); check the path"
