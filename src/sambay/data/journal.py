"""Unfinished work in DIR/.prepare: the plan, the shards written so far, and the final move.

    .prepare/lock            held while a process works here
    .prepare/tokenizer.json  the tokenizer (with its tokenizer_config.json)
    .prepare/plan.json       written after the tokenizer: from here on the work can be continued
    .prepare/train/, .prepare/validation/   shards
    .prepare/units/00003.json  unit 3 is complete; written after its shards
    .prepare/manifest.json   all units are complete; the move to DIR has begun

Every file appears under its name only when complete, and every step of the move can be repeated,
so a process may be killed at any moment.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sambay.data.manifest import MANIFEST_FILE, SPLITS, Manifest
from sambay.data.plan import Plan
from sambay.data.tokenizer import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from sambay.errors import DataError
from sambay.files import WriteFailed, atomic_write, write_json

JOURNAL_FOLDER = ".prepare"


class Journal:
    """The unfinished work in an output folder."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / JOURNAL_FOLDER
        self._plan_file = self.folder / "plan.json"

    def read_plan(self) -> Plan | None:
        """The plan of unfinished work, if it got that far.

        Raises:
            DataError: the plan cannot be read.
        """
        return Plan.read(self._plan_file) if self._plan_file.exists() else None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; create it, and remove it if nothing came of it.

        Raises:
            DataError: another process works on it.
            WriteFailed: the folder cannot be created.
        """
        created = [folder for folder in (self.out, *self.out.parents) if not folder.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            _remove_empty(self.folder, *created)
            raise WriteFailed(
                f"cannot write into {self.out}: {error.strerror}; check --out and its permissions"
            ) from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise DataError(
                    f"another sambay prepare is writing to {self.out}; wait for it to end"
                ) from error
            try:
                yield
            finally:
                if not self._plan_file.exists():
                    shutil.rmtree(self.folder, ignore_errors=True)
                    _remove_empty(*created)
        finally:
            os.close(lock)

    def discard(self) -> None:
        """Forget unfinished work, the plan first."""
        with contextlib.suppress(FileNotFoundError):
            self._plan_file.unlink()
        for path in self.folder.iterdir():
            if path.name == "lock":
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def begin(self, plan: Plan) -> None:
        """Create the folders and record the plan; the tokenizer is there already."""
        try:
            for name in (*SPLITS, "units"):
                (self.folder / name).mkdir(exist_ok=True)
        except OSError as error:
            raise WriteFailed(
                f"cannot create folders in {self.folder}: {error.strerror}; "
                "free some space or check the permissions"
            ) from error
        plan.write(self._plan_file)

    def complete_units(self) -> dict[int, dict[str, Any]]:
        """The results of the units whose files are all there; removes half-written files."""
        self.sweep()
        results = {}
        for file in sorted((self.folder / "units").glob("*.json")):
            try:
                result = json.loads(file.read_bytes())
                sizes = result.pop("sizes")
            except (OSError, ValueError, KeyError, AttributeError):
                continue
            if all(_size(self.folder / name) == size for name, size in sizes.items()):
                results[int(file.stem)] = result
        return results

    def sweep(self) -> None:
        """Remove the temporary files of processes that were stopped in the middle of a write."""
        for leftover in self.folder.glob("**/.*"):
            leftover.unlink()

    def complete_unit(self, number: int, result: dict[str, Any], files: list[str]) -> None:
        """Record that unit `number` is complete, with the sizes of its files."""
        sizes = {name: _size(self.folder / name) for name in files}
        with atomic_write(self.folder / "units" / f"{number:05d}.json") as file:
            file.write(json.dumps({**result, "sizes": sizes}).encode())

    def moving(self) -> bool:
        """Whether all units are complete and the move to the output folder has begun."""
        return (self.folder / MANIFEST_FILE).exists()

    def install(self, manifest: Manifest | None) -> Manifest:
        """Move the finished set into the output folder, its manifest last; drop the journal.

        Without a manifest the move that a kill interrupted is continued.
        """
        if manifest is not None:
            write_json(self.folder / MANIFEST_FILE, manifest.to_dict())
        manifest = Manifest.read(self.folder)
        try:
            for leftover in self.out.glob(f".{MANIFEST_FILE}.*"):
                leftover.unlink()
            # From here to the last line the folder has no manifest, so nobody reads a mixture.
            with contextlib.suppress(FileNotFoundError):
                (self.out / MANIFEST_FILE).unlink()
            for name in SPLITS:
                if (self.folder / name).exists():
                    if (self.out / name).exists():
                        shutil.rmtree(self.out / name)
                    if any((self.folder / name).iterdir()):
                        os.rename(self.folder / name, self.out / name)
            for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE):
                if (self.folder / name).exists():
                    os.replace(self.folder / name, self.out / name)
        except OSError as error:
            raise WriteFailed(
                f"cannot move the finished set into {self.out}: {error}; "
                "cure the cause and run the command again"
            ) from error
        manifest.write(self.out)
        self.forget()
        return manifest

    def forget(self) -> None:
        """Remove the journal, the plan first, so that half a journal is never taken for a whole."""
        with contextlib.suppress(FileNotFoundError):
            self._plan_file.unlink()
        shutil.rmtree(self.folder)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def _remove_empty(*folders: Path) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
