"""Finding the process that holds up all others, and ending the run with its name.

Processes wait for each other in every step. When one stands still, the others cannot tell why they
wait. So each tells a common store where it is, from a thread of its own.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
import threading
import time
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sambay.train.distributed import World

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

EXIT_HANGING = 70
_VERDICT = "verdict"
_OFTEN = 10.0  # seconds between two reports, or less if the patience is short


@dataclass(frozen=True)
class Place:
    """Where a process stands.

    reports: how many this process gave; a frozen process gives no more.
    moves: how many phases it has begun. step: optimiser steps done.
    waits: whether it is inside of torch.distributed. line: where in our own code it is.
    """

    reports: int
    moves: int
    step: int
    phase: str
    waits: bool
    line: str
    host: str
    pid: int


class Watchdog:
    """While entered, ends this process if it stands still; one process says which is to blame."""

    def __init__(self, world: World, seconds: float) -> None:
        self._world, self._seconds = world, seconds
        self._interval = min(seconds / 5, _OFTEN)
        self._moves, self._step, self._phase = 0, 0, "starting"
        self._moved_at = time.monotonic()
        self._reports = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._main = threading.get_ident()

    def at(self, phase: str, step: int | None = None) -> None:
        """Tell that a phase begins, of the step after `step` steps."""
        self._phase = phase
        self._step = self._step if step is None else step
        self._moved_at = time.monotonic()
        self._moves += 1

    def __enter__(self) -> Watchdog:
        if self._world.store is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(self._interval)

    def _watch(self) -> None:
        store = self._own_store()
        while not self._over.wait(self._interval):
            try:
                self._report(store)
                if time.monotonic() - self._moved_at > self._seconds:
                    self._blame(store)
            except (RuntimeError, ValueError) as error:  # what torch raises for a lost store
                if time.monotonic() - self._moved_at > self._seconds:
                    print(
                        f"error: process {self._world.rank} stood for {self._seconds:g} s in "
                        f"'{self._phase}', and the process that runs torch's store (the launcher "
                        f"or process 0) does not answer: {str(error).splitlines()[0]}",
                        file=sys.stderr,
                        flush=True,
                    )
                    _end_process()

    def _own_store(self) -> Store:
        """A connection of this thread's own: the main thread may be waiting on the other."""
        from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]

        shared: Any = self._world.store
        store = shared.clone()
        store.set_timeout(datetime.timedelta(seconds=max(self._interval, 5.0)))
        return PrefixStore("watchdog", store)

    def _report(self, store: Store) -> None:
        self._reports += 1
        waits, line = _whereabouts(self._main)
        place = Place(
            self._reports, self._moves, self._step, self._phase, waits, line,
            platform.node(), os.getpid(),
        )  # fmt: skip
        store.set(str(self._world.rank), json.dumps(asdict(place)))

    def _blame(self, store: Store) -> None:
        before = self._places(store)
        if self._over.wait(3 * self._interval):
            return
        if store.check([_VERDICT]):
            _end_process(float(store.get(_VERDICT)))
        self._report(store)
        now = self._places(store)
        if time.monotonic() - self._moved_at < self._seconds:
            return
        alive = [rank for rank, place in now.items() if place.reports > before[rank].reports]
        if self._world.rank != min(alive, default=self._world.rank):
            return  # to wait for the verdict of that one
        # The store may live in this process, so all end together, when all have read this.
        end_at = time.time() + 6 * self._interval
        store.set(_VERDICT, str(end_at))
        message = _message(now, _guilty(now, alive), self._seconds)
        print(f"error: {message}", file=sys.stderr, flush=True)
        _end_process(end_at)

    def _places(self, store: Store) -> dict[int, Place]:
        places = {}
        for rank in range(self._world.size):
            if store.check([str(rank)]):
                places[rank] = Place(**json.loads(store.get(str(rank))))
            else:
                places[rank] = Place(0, 0, 0, "starting", False, "?", "?", 0)
        return places


def _guilty(places: dict[int, Place], alive: list[int]) -> list[int]:
    """Who holds up the others: the frozen, else the hindmost, of them those that do not wait."""
    frozen = [rank for rank in places if rank not in alive]
    if frozen:
        return frozen
    least = min(place.moves for place in places.values())
    hindmost = [rank for rank, place in places.items() if place.moves == least]
    return [rank for rank in hindmost if not places[rank].waits] or hindmost


def _message(places: dict[int, Place], guilty: list[int], seconds: float) -> str:
    named = [
        f"process {rank} (pid {place.pid} on {place.host}), last seen after step {place.step} in "
        f"'{place.phase}' at {place.line}"
        for rank, place in ((rank, places[rank]) for rank in guilty[:4])
    ]
    more = f" and {len(guilty) - 4} more" if len(guilty) > 4 else ""
    one_of = "one of these" if len(guilty) > 1 else "this process"
    return (
        f"no progress for {seconds:g} s (resilience.hang_seconds); {one_of} holds up the run: "
        f"{'; '.join(named)}{more}; see what it does, then start the run again: it continues from "
        "the last checkpoint"
    )


def _whereabouts(thread: int) -> tuple[bool, str]:
    """Whether a thread is inside of torch.distributed, and its innermost line outside of torch."""
    waits, line = False, "?"
    frame = sys._current_frames().get(thread)
    while frame is not None:
        name = frame.f_code.co_filename
        waits = waits or f"{os.sep}torch{os.sep}distributed" in name
        if line == "?" and f"{os.sep}torch{os.sep}" not in name:
            line = f"{os.path.basename(name)}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return waits, line


def _end_process(at: float = 0.0) -> None:
    time.sleep(max(at - time.time(), 0.0))
    # The main thread cannot be interrupted where it waits, and there is nothing left to save.
    os._exit(EXIT_HANGING)
