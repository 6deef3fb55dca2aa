"""Writing files so that a reader never sees half of one, and fingerprints of what was written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sambay.errors import SambayError


class WriteFailed(SambayError):
    """A file could not be written (disk full, no permission); nothing was left behind."""


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file object whose content appears at `path` only when the block ends without error.

    The content goes to a temporary name in the same folder, is flushed to the disk, and is then
    renamed. On any error the temporary file is removed and an existing `path` stays as it was.

    Raises:
        WriteFailed: the operating system refused (names the file and the cause).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise WriteFailed(_explain(path, error)) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise WriteFailed(_explain(path, error)) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a stable key order, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def sha256_of(path: Path) -> str:
    """The hexadecimal SHA-256 of a file's content, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _explain(path: Path, error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return f"cannot write {path}: the disk is full; free some space and run the command again"
    return f"cannot write {path}: {error.strerror or error}; check the folder and its permissions"
