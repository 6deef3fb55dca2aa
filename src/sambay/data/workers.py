"""Independent tasks spread over processes that cannot outlive, block or silently lose anything.

The standard pools do not fit: one waits forever for a worker the system killed, the other lets
workers finish long tasks after an interrupt, and both leave them behind if the parent is killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from sambay.errors import DataError, SambayError

Task = TypeVar("Task")
Result = TypeVar("Result")
Advance = Callable[[int], None]


def run_tasks(
    work: Callable[[Any, Task, Advance], Result],
    shared: Any,
    tasks: Sequence[Task],
    workers: int,
    advance: Advance,
) -> Generator[tuple[int, Result], None, None]:
    """Pairs (position in `tasks`, result), in the order of completion.

    `work(shared, task, advance)` is a function of a module; `shared` reaches each process once;
    `advance` reports progress. With one worker everything happens in this process.

    Raises:
        SambayError: what `work` raised; all other tasks are stopped at once.
        DataError: a worker process died, most likely for lack of memory.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        for number, task in enumerate(tasks):
            yield number, work(shared, task, advance)
        return
    context = multiprocessing.get_context("spawn")
    processes: dict[Any, Any] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work, shared), daemon=True)
            process.start()
            theirs.close()
            processes[ours] = process
        waiting = iter(enumerate(tasks))
        open_tasks = len(tasks)
        busy = list(processes)
        for connection in busy:
            _send(connection, next(waiting))
        while open_tasks:
            for connection in wait(busy):
                kind, value = _receive(connection, processes[connection])  # type: ignore[index]
                if kind == "progress":
                    advance(value)
                elif kind == "result":
                    open_tasks -= 1
                    task = next(waiting, None)
                    _send(connection, task)
                    if task is None:
                        busy.remove(connection)
                    yield value
                else:
                    raise _rebuild(kind, value)
    finally:
        for connection, process in processes.items():
            process.terminate()
            connection.close()
        for process in processes.values():
            process.join()


def default_workers() -> int:
    """The number of processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _send(connection: Any, item: Any) -> None:
    # A dead worker is noticed, and explained, when its pipe is read.
    with contextlib.suppress(BrokenPipeError):
        connection.send(item)


def _receive(connection: Any, process: Any) -> tuple[Any, Any]:
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError) as error:
        process.join(5)
        raise DataError(
            f"a worker process died (exit code {process.exitcode}; -9 means lack of memory); "
            "use fewer --workers and run the command again, it continues where it stopped"
        ) from error


def _rebuild(kind: Any, message: str) -> Exception:
    if kind is None:
        return RuntimeError(f"a worker process failed:\n{message}")
    # Some errors build their message from other arguments; only the message travels.
    error = kind.__new__(kind)
    error.args = (message,)
    return error


def _serve(connection: Connection, work: Callable[..., Any], shared: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_leave_with_parent, daemon=True).start()

    def advance(count: int) -> None:
        connection.send(("progress", count))

    with contextlib.suppress(BrokenPipeError, EOFError):
        while (item := connection.recv()) is not None:
            number, task = item
            try:
                result = work(shared, task, advance)
            except SambayError as error:
                connection.send((type(error), str(error)))
                return
            except Exception:  # whatever it is, the caller shall know where it came from
                connection.send((None, traceback.format_exc()))
                raise
            connection.send(("result", (number, result)))


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
