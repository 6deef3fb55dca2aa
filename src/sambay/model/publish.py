"""Folders that appear complete or not at all, whatever kills the process that writes them."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sambay.files import WriteFailed


@contextlib.contextmanager
def publish_folder(path: Path) -> Iterator[Path]:
    """A new folder whose content appears at `path` only when the block ends without error.

    The files are flushed to the disk and the folder is renamed as a whole; after a kill at any
    moment `path` is absent, or complete. An existing folder is replaced.

    Raises:
        WriteFailed: the operating system refused; nothing was left behind.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.new."))
    except OSError as error:
        raise WriteFailed(f"cannot create a folder in {path.parent}: {error}") from error
    try:
        yield temporary
        for file in (*temporary.iterdir(), temporary):
            _flush(file)
        temporary.chmod(0o755)
        if path.exists():
            remove_folder(path)
        temporary.rename(path)
        _flush(path.parent)
    except OSError as error:
        raise WriteFailed(
            f"cannot write {path}: {error}; check the disk space and the permissions"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder so that a kill in between leaves it whole or hidden, never half of it.

    Raises:
        WriteFailed: the operating system refused.
    """
    try:
        hidden = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
        path.rename(hidden / path.name)
        shutil.rmtree(hidden)
    except OSError as error:
        raise WriteFailed(f"cannot remove {path}: {error}; check its permissions") from error


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left in `folder`: hidden folders of the two functions above."""
    for pattern in (".*.new.*", ".*.old.*"):
        for left in folder.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
