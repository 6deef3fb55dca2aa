from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sambay.data.workers import run_tasks
from sambay.errors import DataError, MissingPackage


def square(offset: int, task: int, advance: Callable[[int], None]) -> int:
    advance(task)
    return task * task + offset


def misbehave(marks: str, task: str, advance: Callable[[int], None]) -> str:
    if task == "user error":
        raise MissingPackage("pyarrow", "reading", "data")
    if task == "bug":
        raise ZeroDivisionError("our own mistake")
    if task == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(30)
    Path(marks, "survived").touch()
    return task


@pytest.mark.parametrize(("workers", "tasks"), [(1, 20), (2, 20), (9, 3)])
def test_every_task_is_done_once(workers: int, tasks: int) -> None:
    progress: list[int] = []
    results = dict(run_tasks(square, 1, list(range(tasks)), workers, progress.append))
    assert results == {task: task * task + 1 for task in range(tasks)}
    assert sum(progress) == sum(range(tasks))


def test_no_tasks_give_no_results() -> None:
    assert list(run_tasks(square, 1, [], 3, print)) == []


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        ("user error", MissingPackage, r"needs the package 'pyarrow'.*sambay\[data\]"),
        ("bug", RuntimeError, "our own mistake"),
        ("killed", DataError, "exit code -9"),
    ],
)
def test_failures_reach_the_caller_and_stop_the_others_at_once(
    tmp_path: Path, task: str, error: type[Exception], message: str
) -> None:
    started = time.monotonic()
    with pytest.raises(error, match=message):
        list(run_tasks(misbehave, str(tmp_path), ["sleep", task], 2, print))
    assert time.monotonic() - started < 25
    assert not (tmp_path / "survived").exists()
