"""The samples of an evaluation, one JSON line each as soon as it is known, so that none is lost."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from sambay.errors import ConfigError, DataError
from sambay.files import WriteFailed, write_json

SAMPLES, IDENTITY, LOCK = "samples.jsonl", "evaluation.json", ".lock"


class Journal:
    """OUT/samples.jsonl, and OUT/evaluation.json with what all its samples have in common.

    Use as a context manager; only one process at a time may hold a folder. A line that was cut by a
    kill is dropped when the folder is opened again.

    Attributes:
        records: what is known, by key.

    Raises:
        ConfigError: the folder holds another evaluation (names the field), or is in use.
        DataError: a line is damaged that no kill explains.
        WriteFailed: the operating system refused.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self._identity = json.loads(json.dumps(identity))  # as it comes back from the file
        self.records: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Journal:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / LOCK).open("a")
        except OSError as error:
            raise WriteFailed(
                f"cannot write to {self.folder}: {error.strerror}; choose another --out"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ConfigError(
                f"{self.folder} is in use by another evaluation; wait for it or use another --out"
            ) from error
        try:
            self._check_identity()
            self._read()
            self._file = (self.folder / SAMPLES).open("ab")
        except OSError as error:
            self._lock.close()
            raise WriteFailed(f"cannot open {self.folder / SAMPLES}: {error.strerror}") from error
        except BaseException:  # whatever it is, the folder must not stay locked
            self._lock.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._lock.close()

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Keep the record of a sample that was not known.

        Raises:
            WriteFailed: the operating system refused.
        """
        assert key not in self.records, f"{key} is known already"
        line = json.dumps({"key": key, **record}, ensure_ascii=False)
        # What comes back from a file is what the first run must work with too.
        self.records[key] = _without_key(json.loads(line))
        try:
            self._file.write(line.encode("utf-8", "surrogatepass") + b"\n")
            self._file.flush()
        except OSError as error:
            raise WriteFailed(
                f"cannot write {self.folder / SAMPLES}: {error.strerror}; what was kept before is "
                "safe, run the command again"
            ) from error

    def _check_identity(self) -> None:
        path = self.folder / IDENTITY
        if not path.exists():
            if (self.folder / SAMPLES).exists():
                raise DataError(
                    f"{self.folder / SAMPLES} has no {IDENTITY} beside it, so nobody knows what it "
                    "answers; use another --out"
                )
            write_json(path, self._identity)
            return
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}); use another --out") from error
        difference = _difference(earlier, self._identity)
        if difference:
            raise ConfigError(
                f"{self.folder} holds another evaluation: {difference}; use another --out, or "
                "remove that folder"
            )

    def _read(self) -> None:
        path = self.folder / SAMPLES
        if not path.exists():
            return
        content = path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(complete.splitlines(), start=1):
            try:
                record = json.loads(line)
                key = record["key"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}, line {number} is damaged ({error}); remove that line, its sample is "
                    "then answered again"
                ) from error
            self.records[key] = _without_key(record)
        if len(complete) < len(content):
            os.truncate(path, len(complete))


def _without_key(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "key"}


def _difference(earlier: Any, now: Any, name: str = "") -> str:
    """The first field in which two JSON values differ, in words; empty if there is none."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        # A setting says more than the fingerprint that follows from it.
        for field in sorted(earlier.keys() | now.keys(), key=lambda f: (f.endswith("sha256"), f)):
            inner = f"{name}.{field}" if name else field
            if field not in earlier or field not in now:
                where = "this one" if field in now else "that one"
                return f"only {where} has {inner}"
            if found := _difference(earlier[field], now[field], inner):
                return found
        return ""
    return "" if earlier == now else f"{name} was {earlier!r}, now {now!r}"
