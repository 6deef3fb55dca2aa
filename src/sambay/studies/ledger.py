"""What is known of the runs of a ladder: from their directories, and from how they ended."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sambay.files import WriteFailed
from sambay.studies.agreement import check_agreement, check_same_config
from sambay.studies.members import Member
from sambay.studies.queue import RUNS
from sambay.studies.results import (
    DIVERGED,
    FAILED,
    PENDING,
    Result,
    check_same_data,
    described,
    finished_row,
    result_of,
)
from sambay.studies.table import Row, locked, on_one_axis, read_table, write_table

EVENTS = "ladder.jsonl"


class Ledger:
    """The books of a ladder in its folder; several runners may keep them at the same time.

    Opening compares everything that is there with what is asked for, and writes nothing.

    Raises:
        ConfigError: runs that saw different data, or a directory with another run.
        DataError: the table or the data is missing or damaged.
    """

    def __init__(self, members: Sequence[Member], out: Path) -> None:
        self.members, self.out = members, out
        rows = read_table(out)
        # A row of this plan is made anew from its directory, so only other rows have a say.
        mine = {member.name for member in members}
        others = {name: row for name, row in rows.items() if name not in mine}
        self._facts = check_agreement(members, others)
        for member in members:
            if member.config is not None:
                check_same_config(self.run_dir(member), member.config)
                check_same_data(self.run_dir(member), self._facts[member.name])
        self._results: dict[str, Result] = {}
        self._ends: dict[str, tuple[str, str]] = {}
        self._tried: set[str] = set()

    def run_dir(self, member: Member) -> Path:
        """Where a run lives."""
        return self.out / RUNS / member.name

    def is_finished(self, member: Member) -> bool:
        """Whether a run is at its end, whoever trained it."""
        if member.name not in self._results and member.config is not None:
            result = result_of(self.run_dir(member), member.config)
            if result is not None:
                self._results[member.name] = result
        return member.name in self._results

    def has_diverged(self, member: Member) -> bool:
        """Whether a run whose directory is still there diverged when it was last tried."""
        row = read_table(self.out).get(member.name, {})
        return row.get("state") == DIVERGED and self.run_dir(member).exists()

    def begins(self, member: Member) -> None:
        """A run is tried (again): how it ended before does not count any more."""
        self._tried.add(member.name)
        self._ends.pop(member.name, None)

    def ends(self, member: Member, state: str, reason: str) -> None:
        """A run ended as `state` (failed or diverged)."""
        self._ends[member.name] = (state, reason)

    def row(self, member: Member, earlier: Row | None = None) -> Row:
        """The row of a run; `earlier` is the one in the table, which another runner may know."""
        row = described(member, self._facts.get(member.name))
        if self.is_finished(member):
            return finished_row(row, self._results[member.name])
        if member.name in self._ends:
            state, reason = self._ends[member.name]
            return row | {"state": state, "reason": reason}
        was = (earlier or {}).get("state")
        if was in (FAILED, DIVERGED) and member.name not in self._tried and row["state"] == PENDING:
            return row | {name: (earlier or {})[name] for name in ("state", "reason")}
        return row

    def write(self) -> dict[str, Row]:
        """Bring the table up to date; its rows, also of runs that are not of this plan.

        Raises:
            WriteFailed: the operating system refused.
            DataError: the table was damaged meanwhile.
        """
        with locked(self.out):
            rows = read_table(self.out)
            rows |= {one.name: self.row(one, rows.get(one.name)) for one in self.members}
            rows = on_one_axis(rows)
            write_table(self.out, rows)
        return rows

    def record(self, event: str, member: Member | None = None, **facts: Any) -> None:
        """Append what happened to OUT/ladder.jsonl.

        Raises:
            WriteFailed: the operating system refused.
        """
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        line = {"time": now, "event": event} | ({} if member is None else {"run": member.name})
        try:
            with (self.out / EVENTS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line | facts) + "\n")
        except OSError as error:
            raise WriteFailed(f"cannot write {self.out / EVENTS}: {error.strerror}") from error

    def count(self, rows: dict[str, Row], state: str) -> int:
        """How many runs of this plan are in a state."""
        return sum(rows[member.name]["state"] == state for member in self.members)

    @property
    def num_finished(self) -> int:
        return sum(self.is_finished(member) for member in self.members)
