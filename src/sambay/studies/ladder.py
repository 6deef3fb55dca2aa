"""Trains the runs of a ladder, several at once, until all are done or somebody says stop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sambay.studies.ledger import Ledger
from sambay.studies.members import Member, Order, in_order
from sambay.studies.progress import Display, Progress
from sambay.studies.queue import RUNS, Claim, Ended, Slot, Worker, stop_all
from sambay.studies.results import DIVERGED, FAILED, FINISHED, PENDING, UNBUILDABLE, checkpoints
from sambay.studies.table import Row
from sambay.train.display import duration
from sambay.train.interrupt import StopRequest

_TICK = 0.25  # seconds between two looks at the processes
_LOOK_AGAIN = 5.0  # seconds until a run that somebody else trains is looked at again
_SAVE_SECONDS = 300.0  # for a run that was asked to save and end
_TRIES = 3  # of a run that was killed without having come further


@dataclass(frozen=True)
class Outcome:
    """How a call ended.

    stopped_by: the signal that ended it early, if one did.
    budget_is_spent: the minutes were over before all runs were done.
    """

    rows: dict[str, Row]
    finished: int
    failed: int
    pending: int
    unbuildable: int
    stopped_by: int | None
    budget_is_spent: bool


class Runner:
    """Trains what is not done yet of `members`, whose directories are in OUT/runs.

    minutes: after so many, runs save and stop; None: never.
    retry: also those that diverged when they were last tried.
    ordered: what can be built, in the order in which it is started.

    Raises:
        ConfigError, DataError: as `Ledger`, before anything is started or written.
    """

    def __init__(
        self,
        members: Sequence[Member],
        out: Path,
        slots: Sequence[Slot],
        *,
        order: Order = Order.COST,
        minutes: float | None = None,
        retry: bool = False,
        display: Display | None = None,
    ) -> None:
        self.ledger = Ledger(members, out)
        self.out, self._slots = out, slots
        self._deadline = None if minutes is None else time.monotonic() + 60.0 * minutes
        self._display = display or Display()
        self.ordered = ordered = in_order(members, order)
        finished = [one for one in ordered if self.ledger.is_finished(one)]
        self._waiting = [
            one
            for one in ordered
            if one not in finished and (retry or not self.ledger.has_diverged(one))
        ]
        self._progress = Progress(ordered, finished, out / RUNS)
        self._workers: list[Worker] = []
        self._look_at: dict[str, float] = {}  # runs of somebody else, and when to look again
        self._tries: dict[str, tuple[int, Path | None]] = {}

    def run(self) -> Outcome:
        """Train until all is done, the time is over or a signal comes.

        Raises:
            SambayError: the folder cannot be written; processes were told to save and end.
        """
        self.ledger.write()
        self.ledger.record("begin", waiting=[one.name for one in self._waiting])
        with StopRequest() as stop:
            try:
                while self._waiting or self._workers:
                    self._reap()
                    if stop.signal_number is not None or self._is_late():
                        break
                    self._start()
                    self._show()
                    time.sleep(_TICK)
                self._stop(stop)
            finally:  # also after a second Ctrl-C, which says: at once
                stop_all(self._workers, seconds=10.0)
                self._display.close()
        rows = self.ledger.write()
        states = {
            state: self.ledger.count(rows, state)
            for state in (FINISHED, FAILED, DIVERGED, PENDING, UNBUILDABLE)
        }
        self.ledger.record("end", runs=states)
        return Outcome(
            rows,
            finished=states[FINISHED],
            failed=states[FAILED] + states[DIVERGED],
            pending=states[PENDING],
            unbuildable=states[UNBUILDABLE],
            stopped_by=stop.signal_number,
            budget_is_spent=states[PENDING] > 0 and self._is_late(),
        )

    def _is_late(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _start(self) -> None:
        free = list(self._slots)
        for worker in self._workers:
            free.remove(worker.slot)
        for slot in free:
            taken = self._take()
            if taken is None:
                return
            member, claim = taken
            self.ledger.begins(member)
            self._workers.append(Worker(member, slot, claim, self.out))
            step = self._progress.update(member.name)
            place = "" if slot.device is None else f" on {slot.device}"
            self._display.message(
                f"{member.name} " + (f"goes on from step {step}" if step else "starts") + place
            )
            self.ledger.record("start", member, step=step, device=slot.device)

    def _take(self) -> tuple[Member, Claim] | None:
        """The next run that nobody else trains; those that somebody finished are done."""
        for member in list(self._waiting):
            if self._look_at.get(member.name, 0.0) > time.monotonic():
                continue
            claim = Claim.take(self.out, member.name)
            if claim is None:
                if member.name not in self._look_at:
                    self._display.message(f"{member.name} is trained by another process")
                self._look_at[member.name] = time.monotonic() + _LOOK_AGAIN
                continue
            self._look_at.pop(member.name, None)
            self._waiting.remove(member)
            if not self.ledger.is_finished(member):
                return member, claim
            claim.release()
            self._is_done(member, "finished by another process")
        return None

    def _reap(self) -> None:
        for worker in list(self._workers):
            ended = worker.ended()
            if ended is not None:
                self._workers.remove(worker)
                self._note(worker.member, ended)

    def _note(self, member: Member, ended: Ended) -> None:
        if ended.how == "done" and self.ledger.is_finished(member):
            self._is_done(member, "finished")
            return
        if ended.how == "in use":  # a `sambay train` was quicker
            self._waiting.append(member)
            return
        if ended.how == "stopped":
            self.ledger.record("stop", member, reason=ended.reason)
            self._display.message(f"{member.name} saved and stopped {ended.reason}")
            return
        if ended.how == "killed" and self._may_try_again(member):
            self._waiting.append(member)
            self.ledger.record("killed", member, reason=ended.reason)
            self._display.message(f"{member.name} was {ended.reason}; it is tried again")
            return
        state = DIVERGED if ended.how == "diverged" else FAILED
        reason = ended.reason or "it ended without a result"
        self.ledger.ends(member, state, reason)
        self.ledger.record(state, member, reason=reason)
        self._display.message(f"{member.name} {state}: {reason}")
        self.ledger.write()

    def _may_try_again(self, member: Member) -> bool:
        """Whether a run that was killed is started again: it came further, or it is not hopeless.

        A machine short of memory kills runs that would do well alone, and so goes on later.
        """
        found = checkpoints(self.ledger.run_dir(member))
        latest = found[-1] if found else None
        tries, was = self._tries.get(member.name, (0, None))
        tries = 1 if latest != was else tries + 1
        self._tries[member.name] = (tries, latest)
        return tries < _TRIES

    def _is_done(self, member: Member, how: str) -> None:
        self._progress.finish(member.name)
        row = self.ledger.write()[member.name]
        loss = row["validation_loss"]
        self.ledger.record("finish", member, validation_loss=loss, seconds=row["seconds"])
        shown = "no finite validation loss" if loss is None else f"validation loss {loss:.4f}"
        self._display.message(f"{member.name} {how}: {shown} after {duration(row['seconds'])}")

    def _stop(self, stop: StopRequest) -> None:
        """Let the runs that go on save and end."""
        if not self._workers:
            return
        why = "the time is over" if stop.signal_number is None else "stopping"
        names = ", ".join(worker.member.name for worker in self._workers)
        self._display.message(f"{why}; waiting for {names} to save")
        stop_all(self._workers, _SAVE_SECONDS)
        self._reap()

    def _show(self) -> None:
        if self._display.is_due:
            running = [worker.member.name for worker in self._workers]
            for name in running:
                self._progress.update(name)
            self._display.show(self._progress.line(running, list(self._look_at)))
