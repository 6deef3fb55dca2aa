from __future__ import annotations

import os
import signal
import subprocess
import sys
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
    time.sleep(250)
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
    assert time.monotonic() - started < 250  # as long as the other one would have slept
    assert not (tmp_path / "survived").exists()


_LONG_TASK = """
import os, time
from pathlib import Path
from sambay.data.workers import run_tasks

def work(marks, task, advance):
    Path(marks, str(os.getpid())).touch()
    time.sleep(60)

if __name__ == "__main__":
    list(run_tasks(work, MARKS, [1, 2], 2, print))
"""


def test_workers_end_with_their_parent_even_inside_a_long_task(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    script = tmp_path / "long.py"
    script.write_text(_LONG_TASK.replace("MARKS", repr(str(marks))))
    parent = subprocess.Popen([sys.executable, str(script)])
    while len(list(marks.iterdir())) < 2:
        assert parent.poll() is None
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 50
    for mark in marks.iterdir():
        while _alive(int(mark.name)):
            assert time.monotonic() < deadline, "a worker outlived its parent"
            time.sleep(0.01)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    # Whoever adopts orphans in a container may be slow to collect the dead.
    state = Path(f"/proc/{process}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"
