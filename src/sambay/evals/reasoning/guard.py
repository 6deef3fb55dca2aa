"""Work on hostile input in a process of its own, which may hang, grow or crash without harm."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

MEMORY_BYTES = 4 << 30
"""Most address space of the process; more than this is a runaway."""
_WALL_FACTOR = 30
"""A process with a thirtieth of a processor still gets its whole limit."""


class NoReply(Exception):
    """The process ended, or was ended, before it replied; says how."""


class GuardedProcess:
    """Replies of a function in another process, one request at a time, from any thread.

    The limit is one of processor time: it does not depend on what else the machine does, so the
    same request has the same fate on every run. The process is started at the first request and
    again after one that ended it, and ends with this one.

    target: `module:function` with JSON-ready keyword arguments and a JSON-ready result.
    seconds: of processor time for one request, a whole number.
    first: a request that makes the function import all it needs, outside that limit.
    """

    def __init__(self, target: str, *, seconds: int, first: dict[str, Any] | None = None) -> None:
        self._target, self._seconds, self._first = target, seconds, first
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def ask(self, **request: Any) -> Any:
        """What the function returned.

        Raises:
            NoReply: it took too long, crashed, or cannot even be started.
        """
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
                return json.loads(self._line(process))
            except (OSError, ValueError) as error:
                self._end()
                raise NoReply(f"the process ended ({error})") from error
            except BaseException:  # an interrupted wait must not leave its reply to the next one
                self._end()
                raise

    def close(self) -> None:
        """End the process; the next request starts another."""
        with self._lock:
            self._end()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        module, function = self._target.split(":")
        code = (
            "from sambay.evals.reasoning.guard import serve; "
            f"from {module} import {function}; serve({function}, {self._seconds}, {self._first!r})"
        )
        # Sets in the same order on every run, and modules from the same places as here.
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # an interrupt at the keyboard is for this process alone
        )
        weakref.finalize(self, _kill, self._process)
        return self._process

    def _line(self, process: subprocess.Popen[bytes]) -> bytes:
        """The next line the process writes."""
        assert process.stdout is not None
        descriptor = process.stdout.fileno()
        content = b""
        while not content.endswith(b"\n"):
            ready, _, _ = select.select([descriptor], [], [], self._seconds * _WALL_FACTOR)
            if not ready:
                self._end()
                raise NoReply(f"no reply within {self._seconds * _WALL_FACTOR} s")
            block = os.read(descriptor, 1 << 16)
            if not block:
                code = process.wait()
                self._end()
                raise NoReply(
                    f"no reply within {self._seconds} s of processor time"
                    if code == -signal.SIGXCPU
                    else f"the process ended with code {code}"
                )
            content += block
        return content

    def _end(self) -> None:
        if self._process is not None:
            _kill(self._process)
            self._process = None


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):  # what was not sent to a dead process
                stream.close()


def serve(function: Callable[..., Any], seconds: int, first: dict[str, Any] | None) -> None:
    """Reply to the requests on the standard input until it ends."""
    # What a library prints must not look like a reply.
    with os.fdopen(os.dup(1), "wb") as replies:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        if first is not None:
            function(**first)
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        for line in sys.stdin.buffer:
            usage = resource.getrusage(resource.RUSAGE_SELF)
            limit = math.ceil(usage.ru_utime + usage.ru_stime) + seconds
            soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
            replies.write(json.dumps(function(**json.loads(line))).encode() + b"\n")
            replies.flush()
