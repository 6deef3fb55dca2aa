"""Processes that train the runs of a ladder: started, watched, stopped; each run claimed once."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from sambay.errors import ConfigError
from sambay.files import WriteFailed
from sambay.studies.members import Member
from sambay.studies.worker import DIVERGED, ERROR, REFUSED
from sambay.train.config import Device, RunConfig
from sambay.train.run_dir import LOCK

RUNS, LOGS, CLAIMS = "runs", "logs", ".claims"
WORKER = "sambay.studies.worker"
IN_USE = "is in use by process"  # as train.run_dir says it


@dataclass(frozen=True)
class Slot:
    """A place where one run at a time is trained.

    device: "cpu", "cuda" or "cuda:N"; None: what the recipe says.
    threads: of the CPU; None: what the recipe says.
    """

    device: str | None = None
    threads: int | None = None

    def placed(self, config: RunConfig) -> RunConfig:
        """The configuration of a run that is trained here."""
        if self.device is not None:
            config = replace(config, device=Device(self.device.partition(":")[0]))
        return config if self.threads is None else replace(config, threads=self.threads)

    def environment(self) -> dict[str, str]:
        """The environment of a process that is to see this device alone."""
        values = dict(os.environ)
        if self.threads is not None:  # also for what starts threads before torch is told
            values["OMP_NUM_THREADS"] = str(self.threads)
        kind, colon, number = (self.device or "").partition(":")
        if kind == "cpu":
            values["CUDA_VISIBLE_DEVICES"] = ""
        elif colon:
            visible = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
            if visible and int(number) >= len(visible):
                raise ConfigError(
                    f"--devices {self.device}: CUDA_VISIBLE_DEVICES shows {len(visible)} devices; "
                    "name others or change it"
                )
            values["CUDA_VISIBLE_DEVICES"] = visible[int(number)] if visible else number
        return values


def slots(devices: Sequence[str], processes: int, threads: int | None) -> list[Slot]:
    """Places for `processes` runs at once on each device (or without naming any).

    Raises:
        ConfigError: a device that cannot be, or one that this machine hides.
    """
    for device in devices:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
            raise ConfigError(f"--devices {device}: write cpu, cuda or cuda:0,cuda:1")
    made = [Slot(device, threads) for _ in range(processes) for device in devices or (None,)]
    for slot in made:
        slot.environment()
    return made


class Claim:
    """A run that no other runner may start while this, or a process started with it, is alive."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    @classmethod
    def take(cls, out: Path, name: str) -> Claim | None:
        """The claim, or None if somebody else holds it or trains in the run directory.

        Raises:
            WriteFailed: the folder cannot be written.
        """
        path = out / CLAIMS / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a")
        except OSError as error:
            raise WriteFailed(
                f"cannot write {path}: {error.strerror}; correct the permissions of {out}"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return None
        if _is_trained_in(out / RUNS / name):
            file.close()
            return None
        return cls(file)

    @property
    def descriptor(self) -> int:
        return self._file.fileno()

    def release(self) -> None:
        """Give it up; a process that inherited it goes on holding it."""
        self._file.close()


@dataclass(frozen=True)
class Ended:
    """How a process ended: "done", "stopped", "failed", "diverged", "killed" or "in use"."""

    how: str
    reason: str = ""


class Worker:
    """A run being trained by a process of its own, in a session that no Ctrl-C reaches."""

    def __init__(self, member: Member, slot: Slot, claim: Claim, out: Path) -> None:
        assert member.config is not None
        self.member, self.slot, self.claim = member, slot, claim
        self.run_dir, self.log = out / RUNS / member.name, out / LOGS / f"{member.name}.log"
        self._is_told_to_stop = False
        line = json.dumps(slot.placed(member.config).to_dict()) + "\n"
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", WORKER, str(self.run_dir)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=slot.environment(),
                    pass_fds=[claim.descriptor],
                    start_new_session=True,
                )
        except OSError as error:
            raise WriteFailed(
                f"cannot start a run that writes {self.log}: {error.strerror}"
            ) from error
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended already; its exit code says more
            self.process.stdin.write(line.encode())
            self.process.stdin.flush()

    def ended(self) -> Ended | None:
        """How it ended; None while it goes on."""
        code = self.process.poll()
        if code is None:
            return None
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.claim.release()
        if code == 0:
            return Ended("done")
        if code > 128 or (code < 0 and self._is_told_to_stop):
            return Ended("stopped", f"by signal {code - 128 if code > 128 else -code}")
        reason = self._last_words()
        if code == DIVERGED:
            return Ended("diverged", reason)
        if code == REFUSED and IN_USE in reason:
            return Ended("in use", reason)
        if code < 0:
            return Ended("killed", f"killed by {signal.Signals(-code).name}; see {self.log}")
        return Ended("failed", reason if code == REFUSED else f"{reason}; see {self.log}")

    def stop(self) -> None:
        """Ask it to save and end; a second time: to end at once."""
        self._is_told_to_stop = True
        if self.process.poll() is None:
            self.process.terminate()

    def wait(self, seconds: float) -> None:
        """Return when it has ended, or after some seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    def _last_words(self) -> str:
        """The last error it reported; of a bug in it the last line of its traceback."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        said = [line for line in text.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith(ERROR)]
        if self.process.returncode in (DIVERGED, REFUSED) and errors:
            return errors[-1].removeprefix(ERROR)
        return said[-1] if said else "it ended without a word"


def stop_all(workers: Sequence[Worker], seconds: float) -> None:
    """Let all workers save and end; those that take too long are left to end by themselves."""
    for worker in workers:
        worker.stop()
    deadline = time.monotonic() + seconds
    for worker in workers:
        worker.wait(max(0.0, deadline - time.monotonic()))


def _is_trained_in(run_dir: Path) -> bool:
    """Whether a `sambay train` that knows nothing of claims holds the run directory."""
    path = run_dir / LOCK
    try:
        os.kill(int(path.read_text()), 0)
    except PermissionError:
        pass  # it lives, as another user's
    except (OSError, ValueError):
        return False  # never held, or its process is gone: no need to touch the lock
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
