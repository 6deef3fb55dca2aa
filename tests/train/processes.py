"""Running a function in several processes that together are one training run."""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMEOUT = 240.0  # a machine may have other things to do
# Imported before the fork, so that not every process has to.
_SHARED = (
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
)


class Ended:
    """How a process ended: its exit status, and what its function gave or raised."""

    def __init__(self, status: int, result: Any, error: str | None) -> None:
        self.status, self.result, self.error = status, result, error


def free_port() -> int:
    """A port for the processes to meet at, below those a system gives away by itself.

    One of the latter could be given to another connection before the first process listens on it.
    """
    for port in random.Random(os.urandom(8)).sample(range(10_000, 32_000), 50):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port
    raise OSError("no free port")


def start(count: int, action: Callable[[], Any], folder: Path) -> list[int]:
    """Fork `count` processes that find each other as torchrun's do; their ids.

    Forking saves each of them the seconds that importing torch takes.
    """
    for module in _SHARED:
        importlib.import_module(module)
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    environment = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
            _run(action, folder / f"{rank}.pickle")
        children.append(child)
    return children


def _run(action: Callable[[], Any], answer: Path) -> None:
    status = 0
    try:
        value, error = action(), None
    except BaseException as caught:  # noqa: BLE001 - reported to the parent, whatever it is
        value, error, status = None, f"{type(caught).__name__}: {caught}", 1
        if os.environ.get("SHOW_TRACES"):
            traceback.print_exc()
    answer.write_bytes(pickle.dumps((value, error)))
    os._exit(status)


def finish(children: list[int], folder: Path, seconds: float = TIMEOUT) -> list[Ended]:
    """Wait for processes; those that take too long are killed."""
    deadline = time.monotonic() + seconds
    ended: dict[int, int] = {}
    while len(ended) < len(children) and time.monotonic() < deadline:
        for child in children:
            if child not in ended:
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    ended[child] = status
        time.sleep(0.01)
    for child in children:
        if child not in ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            ended[child] = os.waitpid(child, 0)[1]
    answers = []
    for rank, child in enumerate(children):
        file = folder / f"{rank}.pickle"
        result, error = pickle.loads(file.read_bytes()) if file.exists() else (None, "no answer")
        answers.append(Ended(ended[child], result, error))
        file.unlink(missing_ok=True)
    return answers


def together(count: int, action: Callable[[], Any], folder: Path) -> list[Any]:
    """What `action` gave in each of `count` processes, none of which may fail."""
    ended = finish(start(count, action, folder), folder)
    errors = {rank: one.error for rank, one in enumerate(ended) if one.error or one.status}
    assert not errors, errors
    return [one.result for one in ended]
