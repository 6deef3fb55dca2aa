"""The backends of every operation: how one is chosen for a call, and why another could not be.

An operation's package registers its backends when it is imported. `why_unavailable(call)` answers
None if the backend can serve `call` (an object of the operation's own making, such as its main
tensor), else the reason and, where there is one, the remedy. It is also asked with `call=None`,
meaning "on this machine, whatever the call".
"""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from sambay.errors import BackendUnavailable, nearest
from sambay.ops.tracing import constant_when_traced

REFERENCE = "reference"
_log = logging.getLogger("sambay.ops")


class Backend(NamedTuple):
    """One implementation of an operation; the highest `priority` available for a call is taken."""

    op: str
    name: str
    priority: int
    fn: Callable[..., Any]
    why_unavailable: Callable[[Any], str | None]


class Row(NamedTuple):
    """One line of `table()`; `reason` is empty when the backend is available."""

    op: str
    backend: str
    available: bool
    reason: str


_backends: dict[str, list[Backend]] = {}
_logged: set[str] = set()


def always(call: Any) -> str | None:
    """None: the `why_unavailable` of a backend that serves every call on every machine."""
    return None


def register(
    op: str,
    name: str,
    priority: int,
    fn: Callable[..., Any],
    why_unavailable: Callable[[Any], str | None] = always,
) -> None:
    """Make `fn` known as backend `name` of `op`; registering the same name again replaces it."""
    others = [backend for backend in _backends.get(op, []) if backend.name != name]
    added = Backend(op, name, priority, fn, why_unavailable)
    _backends[op] = sorted([*others, added], key=lambda backend: -backend.priority)


def choose(op: str, backend: str | None, call: Any) -> Callable[..., Any]:
    """The function to run for this call: the named backend's, or the best available one's.

    With SAMBAY_REFERENCE=1 in the environment it is always the reference's, whatever was named.

    Raises:
        BackendUnavailable: the named backend is unknown, or cannot serve this call.
    """
    candidates = _backends[op]
    if reference_forced():
        backend = REFERENCE
    if backend is not None:
        for candidate in candidates:
            if candidate.name == backend:
                reason = candidate.why_unavailable(call)
                if reason is not None:
                    raise BackendUnavailable(f"{op} backend '{backend}' cannot be used: {reason}")
                return candidate.fn
        hint = nearest(backend, (candidate.name for candidate in candidates))
        raise BackendUnavailable(f"{op} has no backend '{backend}'{hint}")
    refused: list[str] = []
    for candidate in candidates:
        reason = candidate.why_unavailable(call)
        if reason is None:
            _log_once(op, candidate.name, refused)
            return candidate.fn
        refused.append(f"{candidate.name}: {reason}")
    raise BackendUnavailable(f"{op} has no backend for this call ({'; '.join(refused)})")


def table() -> list[Row]:
    """Every operation of `sambay.ops` with its backends, best first, as seen on this machine."""
    package = importlib.import_module("sambay.ops")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"sambay.ops.{module.name}")
    rows = []
    for op in sorted(_backends):
        for backend in _backends[op]:
            reason = backend.why_unavailable(None)
            rows.append(Row(op, backend.name, reason is None, reason or ""))
    return rows


# Traced code may not read the environment, and the answer is one for the whole process.
@constant_when_traced
def reference_forced() -> bool:
    """Whether the environment asks for the references of all operations."""
    return os.environ.get("SAMBAY_REFERENCE") == "1"


def _log_once(op: str, chosen: str, refused: list[str]) -> None:
    # A log call would break the graph while torch.compile traces.
    if torch.compiler.is_compiling() or op in _logged:
        return
    _logged.add(op)
    _log.info("%s: using backend '%s'%s", op, chosen, f" ({'; '.join(refused)})" if refused else "")
