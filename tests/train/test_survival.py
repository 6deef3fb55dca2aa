"""Signals, killed, frozen and failing processes, and steps that cannot be used: nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sambay.cli.main import main
from sambay.data.batch_source import BatchSource
from sambay.files import write_json
from sambay.train import trainer
from sambay.train.checkpoint import CheckpointStore
from sambay.train.config import (
    BatchConfig,
    CheckpointConfig,
    OnExceed,
    ResilienceConfig,
    RunConfig,
    ScheduleConfig,
)
from sambay.train.loop import train
from sambay.train.metrics import read_metrics
from sambay.train.resilience import TrainingDiverged
from sambay.train.run_dir import claimed
from sambay.train.watchdog import Watchdog
from tests.train.conftest import SEQUENCE
from tests.train.processes import Ended, finish, start, together
from tests.train.test_distributed import assert_close
from tests.train.test_resume import StopAt, assert_same_run, lines

MakeConfig = Callable[..., RunConfig]
BATCH = 4


@pytest.fixture
def make(make_config: MakeConfig) -> MakeConfig:
    def make(steps: int = 6, **fields: Any) -> RunConfig:
        tokens = BATCH * SEQUENCE
        fields = {
            "batch": BatchConfig(BATCH, BATCH),
            "checkpoint": CheckpointConfig(every_steps=2, keep=1),
            **fields,
        }
        return make_config(schedule=ScheduleConfig(steps * tokens, warmup_tokens=tokens), **fields)

    return make


def is_rank(rank: int) -> bool:
    return os.environ.get("RANK") == str(rank)


def two(config: RunConfig, run_dir: Path, **options: Any) -> list[Any]:
    return together(2, lambda: train(config, run_dir, **options), run_dir.with_suffix(".answers"))


def ended(config: RunConfig, run_dir: Path, **options: Any) -> list[Ended]:
    folder = run_dir.with_suffix(".answers")
    return finish(start(2, lambda: train(config, run_dir, **options), folder), folder)


@pytest.mark.parametrize("moments", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_kill_9_of_one_process_at_random_moments(
    moments: int, make: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No run gets to its end before, however long this process is kept from killing it."""
    plain = BatchSource.batch

    def waiting_after(last: int, sign: Path) -> Callable[..., Any]:
        def batch(self: BatchSource, step: int, rows: slice) -> Any:
            while step >= last and not sign.exists():
                time.sleep(0.005)
            return plain(self, step, rows)

        return batch

    config = make(steps=3 * moments + 1, checkpoint=CheckpointConfig(1, keep=2))
    killed, answers = tmp_path / "killed", tmp_path / "answers"
    store = CheckpointStore(killed, config.checkpoint)
    generator = random.Random(moments)
    for _ in range(moments):
        reached = max(store.steps(), default=0)
        killing = tmp_path / f"killed after {reached}"
        with monkeypatch.context() as patch:
            patch.setattr(BatchSource, "batch", waiting_after(reached + 3, killing))
            children = start(2, lambda: train(config, killed), answers)
        deadline = time.monotonic() + 200
        while max(store.steps(), default=0) < reached + 1:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(generator.random() * 0.3)
        victim = generator.randrange(2)
        os.kill(children[victim], signal.SIGKILL)
        killing.touch()
        both = finish(children, answers)
        assert os.WTERMSIG(both[victim].status) == signal.SIGKILL
        assert "LostConnection" in str(both[1 - victim].error), both[1 - victim].error
    two(config, killed)
    two(config, tmp_path / "whole")
    assert_same_run(killed, tmp_path / "whole")


@pytest.mark.parametrize(
    ("rank", "number", "to_the_end"),
    [
        (1, signal.SIGTERM, False),
        pytest.param(1, signal.SIGTERM, True, marks=pytest.mark.slow),
        pytest.param(0, signal.SIGINT, True, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_process_stops_all_with_a_checkpoint(
    rank: int,
    number: int,
    to_the_end: bool,
    make: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also when it comes three times, from the terminal and from the launcher."""
    plain = BatchSource.batch

    def interrupted(self: BatchSource, step: int, rows: slice) -> Any:
        if is_rank(rank) and step == 2:
            for _ in range(3):
                os.kill(os.getpid(), number)
        return plain(self, step, rows)

    config = make()
    run_dir = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(BatchSource, "batch", interrupted)
        outcomes = two(config, run_dir)
    assert [(one.progress.step, one.stopped_by) for one in outcomes] == [(3, number)] * 2
    assert CheckpointStore(run_dir, config.checkpoint).steps() == [3]
    if not to_the_end:
        return
    two(config, run_dir)
    two(config, tmp_path / "whole")
    assert_same_run(run_dir, tmp_path / "whole")


def poison(
    monkeypatch: pytest.MonkeyPatch, calls: set[int], factor: float, rank: int | None = None
) -> None:
    """Multiply the objective of these training steps (counted in calls) by a factor."""
    plain, count = trainer.Trainer._losses, 0

    def poisoned(self: trainer.Trainer, batch: Any) -> Any:
        nonlocal count
        losses = plain(self, batch)
        if torch.is_grad_enabled():
            count += 1
            if count in calls and (rank is None or is_rank(rank)):
                return losses._replace(
                    objective=losses.objective * factor, nats=losses.nats * factor
                )
        return losses

    monkeypatch.setattr(trainer.Trainer, "_losses", poisoned)


def test_a_step_that_is_not_finite_on_one_process_is_skipped_by_all(
    make: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(steps=4, checkpoint=CheckpointConfig(every_steps=100))
    poison(monkeypatch, {2}, math.nan, rank=1)
    outcomes = two(config, tmp_path / "two")
    assert [one.progress.skipped for one in outcomes] == [1, 1]
    log = {line["step"]: line for line in read_metrics(tmp_path / "two")}
    assert "skipped" not in log[1]
    assert log[2]["skipped"] == log[4]["skipped"] == 1
    assert math.isfinite(log[4]["loss"])
    poison(monkeypatch, {2}, math.nan)
    one = train(config, tmp_path / "one")
    assert one.progress.updates == 3
    last = read_metrics(tmp_path / "one")[-1]
    assert last["loss"] == pytest.approx(log[4]["loss"], abs=1e-5)


def test_a_skipped_step_survives_a_restart(
    make: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make()
    with monkeypatch.context() as patch:
        poison(patch, {2}, math.inf)
        train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        poison(patch, {2}, math.inf)
        train(config, tmp_path / "cut", display=StopAt(4))
    assert train(config, tmp_path / "cut").progress.skipped == 1
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_too_many_in_a_row_stop_the_run_and_keep_the_checkpoint(
    make: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(resilience=ResilienceConfig(max_skips=2))
    poison(monkeypatch, {3, 4, 5}, math.nan)
    with pytest.raises(
        TrainingDiverged, match=r"step 5: the loss is nan .*3 steps in a row"
    ) as got:
        train(config, tmp_path)
    assert "step-00000002" in str(got.value)
    assert "\n" not in str(got.value)
    assert CheckpointStore(tmp_path, config.checkpoint).steps() == [2]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_run_turns_back_and_goes_on_with_other_data(
    count: int, make: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ResilienceConfig(max_skips=1, on_exceed=OnExceed.REWIND)
    config = make(resilience=settings)
    read = []
    plain = BatchSource.batch

    def watched(self: BatchSource, step: int, rows: slice) -> Any:
        read.append(step)
        return plain(self, step, rows)

    poison(monkeypatch, {3, 4}, math.nan, rank=None if count == 1 else 1)
    monkeypatch.setattr(BatchSource, "batch", watched)
    if count == 1:
        outcome = train(config, tmp_path / "run")
        assert read == [0, 1, 2, 3, 4, 5, 6, 7]
    else:
        outcome = two(config, tmp_path / "run")[1]
    progress = outcome.progress
    assert (progress.step, progress.rewinds, progress.skipped) == (6, 1, 0)
    assert progress.batch_offset == 2
    log = read_metrics(tmp_path / "run")
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert [line.get("rewinds") for line in log] == [None, None, 1, 1, 1, 1]


def test_it_turns_back_only_so_often(
    make: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ResilienceConfig(max_skips=0, on_exceed=OnExceed.REWIND, max_rewinds=2)
    poison(monkeypatch, {3, 4, 5}, math.nan)
    with pytest.raises(TrainingDiverged, match="after 2 rewinds"):
        train(make(resilience=settings), tmp_path)


@pytest.mark.slow
def test_a_spike_of_the_loss_is_skipped_if_asked(
    make: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {14}, 3.0)
    settings = ResilienceConfig(spike_factor=2.0, spike_window=10)
    plain = train(make(steps=15), tmp_path / "plain")
    assert plain.progress.skipped == 0
    poison(monkeypatch, {14}, 3.0)
    careful = train(make(steps=15, resilience=settings), tmp_path / "careful")
    assert careful.progress.skipped == 1
    assert len(careful.progress.recent_losses) == 10
    first, second = lines(tmp_path / "plain"), lines(tmp_path / "careful")
    assert [line["loss"] for line in first[:14]] == [line["loss"] for line in second[:14]]
    assert second[14]["loss"] != first[14]["loss"]


def test_a_full_disk_under_one_process_stops_all_and_leaves_the_last_checkpoint(
    make: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make()
    plain = os.fsync

    def full(file: int) -> None:
        if is_rank(1) and CheckpointStore(tmp_path / "run", config.checkpoint).steps() == [2]:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        both = ended(config, tmp_path / "run")
    assert all("WriteFailed" in str(one.error) for one in both), [one.error for one in both]
    assert all("the disk is full" in str(one.error) for one in both), [one.error for one in both]
    left = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert left == ["step-00000002"]
    # What two left one continues: also a test of a changed number of processes.
    assert train(config, tmp_path / "run").progress.step == 6
    train(config, tmp_path / "whole")
    assert_close(read_metrics(tmp_path / "run"), read_metrics(tmp_path / "whole"))


@pytest.mark.parametrize("how", ["sleeping", pytest.param("frozen", marks=pytest.mark.slow)])
def test_a_process_that_stands_still_is_named(
    how: str, make: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, start_watching = BatchSource.batch, Watchdog.__enter__
    entered: list[Watchdog] = []

    def enter(self: Watchdog) -> Watchdog:
        entered.append(self)
        return self

    def stuck(self: BatchSource, step: int, rows: slice) -> Any:
        if step == 2:  # not before: on a busy machine a first step may take longer than two seconds
            start_watching(entered[0])
        if is_rank(1) and step == 2:
            if how == "frozen":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(100)
        return plain(self, step, rows)

    monkeypatch.setattr(Watchdog, "__enter__", enter)
    monkeypatch.setattr(BatchSource, "batch", stuck)
    config = make(resilience=ResilienceConfig(hang_seconds=2.0))
    errors = tmp_path / "errors"

    def action() -> None:
        sys.stderr = errors.open("a")
        train(config, tmp_path / "run")

    children = start(2, action, tmp_path)
    (first,) = finish(children[:1], tmp_path, 60)
    if how == "frozen":
        os.kill(children[1], signal.SIGKILL)
    finish(children[1:], tmp_path, 20)
    # The watchdog ends all at once, but one may notice first that its peer is gone.
    assert os.WEXITSTATUS(first.status) == 70 or "LostConnection" in str(first.error)
    (message,) = [line for line in errors.read_text().splitlines() if "holds up" in line]
    assert "error: no progress for 2 s (resilience.hang_seconds); this process holds" in message
    assert f"up the run: process 1 (pid {children[1]} on" in message
    if how == "sleeping":  # a frozen one was last seen a little earlier
        assert "last seen after step 2 in 'reading the batch' at test_survival.py" in message


def test_a_directory_in_use_is_refused_in_all_processes(make: MakeConfig, tmp_path: Path) -> None:
    config = make()
    with claimed(tmp_path / "run"):
        both = ended(config, tmp_path / "run")
    assert "ConfigError" in str(both[0].error)
    assert "ToldByAnother" in str(both[1].error)
    for one in both:
        assert "in use by process" in str(one.error)


def test_a_process_that_cannot_write_is_named(
    make: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sambay.train import run_dir

    def refused(dir: Path) -> Any:
        if is_rank(1):
            raise PermissionError(errno.EACCES, "Permission denied")
        return plain(dir=dir)

    plain = run_dir.tempfile.TemporaryFile
    monkeypatch.setattr(run_dir.tempfile, "TemporaryFile", refused)
    both = ended(make(), tmp_path / "run")
    assert "process 1: cannot write to the run directory" in str(both[0].error)
    assert "Permission denied" in str(both[1].error)


def test_another_recipes_checkpoint_is_refused_in_all_processes(
    make: MakeConfig, tmp_path: Path
) -> None:
    config = make(steps=2)
    train(config, tmp_path / "run")
    both = ended(replace(config, seed=6), tmp_path / "run")
    for one in both:
        assert "seed = 6, but" in str(one.error)


def assert_like_one(config: RunConfig, folder: Path, printed: str) -> None:
    """What two processes wrote below `folder`, and together printed, against one process."""
    assert printed.count("finished 3 steps") == 1
    assert printed.count("learning rate") == 1
    train(config, folder / "one")
    for mine, theirs in zip(
        read_metrics(folder / "two"), read_metrics(folder / "one"), strict=True
    ):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_the_command_runs_in_several_processes(make: MakeConfig, tmp_path: Path) -> None:
    config = make(steps=3, checkpoint=CheckpointConfig(every_steps=100))
    write_json(tmp_path / "config.json", config.to_dict())
    words = ["train", str(tmp_path / "config.json"), "--run-dir", str(tmp_path / "two")]
    printed = tmp_path / "printed"

    def action() -> int:
        with printed.open("a") as file, contextlib.redirect_stdout(file):
            return main([*words, "batch.micro_batch_size=1"])

    assert together(2, action, tmp_path / "answers") == [0, 0]
    assert_like_one(config, tmp_path, printed.read_text())


@pytest.mark.slow
def test_torchrun_starts_the_same_command(make: MakeConfig, tmp_path: Path) -> None:
    config = make(steps=3)
    write_json(tmp_path / "config.json", config.to_dict())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "sambay.train", str(tmp_path / "config.json")]
    words = [*command, "--run-dir", str(tmp_path / "two"), "batch.micro_batch_size=1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert_like_one(config, tmp_path, done.stdout)
