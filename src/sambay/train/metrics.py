"""What a run measured: one JSON line per logged step, and optionally the same in TensorBoard."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from sambay.errors import DataError, MissingPackage
from sambay.files import WriteFailed, atomic_write
from sambay.train.run_dir import METRICS, TENSORBOARD


class MetricsLog:
    """Appends to RUN_DIR/metrics.jsonl, after dropping what a resumed run will write again.

    `last_step` is the step of the checkpoint the run continues from (0: a new run). Each line has
    "step" (optimiser steps done), no step has two lines.

    Raises:
        MissingPackage: TensorBoard was asked for and is not installed.
        WriteFailed: the operating system refused to write.
    """

    def __init__(self, run_dir: Path, *, last_step: int, tensorboard: bool) -> None:
        self.path = run_dir / METRICS
        _drop_lines_after(self.path, last_step)
        try:
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._failure(error) from error
        self._board = _tensorboard_writer(run_dir, last_step + 1) if tensorboard else None

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
        if self._board is not None:
            self._board.close()

    def write(self, values: dict[str, float]) -> None:
        """Append one line, which has a "step"; it is with the operating system on return."""
        try:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._failure(error) from error
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, values["step"])

    def flush_to_disk(self) -> None:
        """Make sure that all lines survive a power cut; called before a checkpoint is published."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> WriteFailed:
        return WriteFailed(
            f"cannot write {self.path}: {error.strerror}; correct that and run the command again"
        )


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl in order; a half-written last line is left out.

    Raises:
        DataError: a line that is no JSON object with a step (names it).
    """
    path = run_dir / METRICS
    if not path.exists():
        return []
    complete = path.read_text(encoding="utf-8").rpartition("\n")[0]
    lines = []
    for number, text in enumerate(complete.splitlines(), start=1):
        try:
            line = json.loads(text)
            _ = line["step"] + 0
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}, line {number} is damaged; remove that line") from error
        lines.append(line)
    return lines


def _drop_lines_after(path: Path, last_step: int) -> None:
    lines = read_metrics(path.parent)
    kept = [line for line in lines if line["step"] <= last_step]
    with atomic_write(path) as file:
        file.write("".join(json.dumps(line) + "\n" for line in kept).encode())


def _tensorboard_writer(run_dir: Path, next_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingPackage("tensorboard", "logging.tensorboard=true", "train") from error
    return SummaryWriter(str(run_dir / TENSORBOARD), purge_step=next_step)
