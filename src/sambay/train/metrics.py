"""What a run measured: one JSON line per logged step, and the same numbers to its sinks."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from sambay.errors import DataError
from sambay.files import WriteFailed, atomic_write
from sambay.train.run_dir import METRICS
from sambay.train.sinks import MetricsSink, describe_failure


class MetricsLog:
    """Appends to RUN_DIR/metrics.jsonl, after dropping what a resumed run will write again.

    `last_step` is the step of the checkpoint the run continues from (0: a new run). Each line has
    "step" (optimiser steps done), no step has two lines. Values that are no finite numbers are
    null there and left out of the `sinks`. A sink that fails is told to `warn` and left behind.

    Raises:
        WriteFailed: the operating system refused to write.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        last_step: int,
        sinks: Mapping[str, MetricsSink] | None = None,
        warn: Callable[[str], None] = print,
    ) -> None:
        self.path = run_dir / METRICS
        self._sinks = dict(sinks or {})
        self._warn = warn
        try:
            _drop_lines_after(self.path, last_step)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._failure(error) from error

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):  # every line was flushed, or its failure reported
            self._file.close()
        for name in tuple(self._sinks):
            self._tell(name, lambda sink: sink.close())

    def write(self, values: Mapping[str, float]) -> None:
        """Append one line, which has a "step"; it is with the operating system on return."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        line = {name: finite.get(name) for name in values}
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._failure(error) from error
        step = int(finite.pop("step"))
        for name in tuple(self._sinks):
            self._tell(name, lambda sink: sink.write(step, finite))

    def flush_to_disk(self) -> None:
        """Make sure that all lines survive a power cut; called before a checkpoint is published."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failure(error) from error

    def _tell(self, name: str, action: Callable[[MetricsSink], None]) -> None:
        try:
            action(self._sinks[name])
        except Exception as error:  # noqa: BLE001 - whatever a tool does, the run goes on
            del self._sinks[name]
            self._warn(describe_failure(name, error))

    def _failure(self, error: OSError) -> WriteFailed:
        return WriteFailed(
            f"cannot write {self.path}: {error.strerror}; correct that and run the command again"
        )


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl in order; a half-written last line is left out.

    Raises:
        DataError: a line that is no JSON object with a step (names it).
    """
    lines, damaged = readable_metrics(run_dir)
    if damaged:
        raise DataError(f"{run_dir / METRICS}, line {damaged[0]} is damaged; remove that line")
    return lines


def readable_metrics(run_dir: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The lines of a run's metrics.jsonl that can be read, and the numbers of those that cannot.

    A last line without its end is still being written, or was cut by a crash; it is neither.
    """
    path = run_dir / METRICS
    if not path.exists():
        return [], []
    complete = path.read_bytes().rpartition(b"\n")[0]
    lines, damaged = [], []
    for number, text in enumerate(complete.split(b"\n") if complete else [], start=1):
        try:
            line = json.loads(text)
            _ = line["step"] + 0
        except (ValueError, TypeError, KeyError):
            damaged.append(number)
        else:
            lines.append(line)
    return lines, damaged


def _drop_lines_after(path: Path, last_step: int) -> None:
    lines = read_metrics(path.parent)
    kept = [line for line in lines if line["step"] <= last_step]
    with atomic_write(path) as file:
        file.write("".join(json.dumps(line) + "\n" for line in kept).encode())
