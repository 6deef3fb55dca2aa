"""A run cut anywhere ends with the same bits as one that was never cut."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sambay.errors import CheckpointMismatch, ConfigError
from sambay.train.checkpoint import CheckpointStore
from sambay.train.config import (
    ActivationCheckpointing,
    BatchConfig,
    CheckpointConfig,
    Device,
    EvaluationConfig,
    OptimizerConfig,
    Precision,
    RunConfig,
    ScheduleConfig,
)
from sambay.train.display import Display
from sambay.train.loop import train
from sambay.train.metrics import read_metrics
from sambay.train.pieces import load_pieces, pieces_of, stored_shapes
from tests.train.conftest import GLOBAL_BATCH, SEQUENCE, make_data

MakeConfig = Callable[..., RunConfig]
# Measured, so they differ from run to run.
QUIET = ("seconds", "tokens_per_second", "memory/host", "memory/host_peak")


class StopAt(Display):
    """Sends this process a signal when a step has been shown."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        super().__init__()
        self._stop_step, self._number = step, number

    def step(self, step: int, *rest: Any) -> None:
        if step == self._stop_step:
            # To this thread, at once: one sent to the process may wait for another thread, and a
            # second one would be lost in it.
            signal.raise_signal(self._number)


def final_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    latest = CheckpointStore(run_dir, CheckpointConfig()).latest()
    assert latest is not None
    tensors = {name: torch.zeros(shape) for name, shape in stored_shapes(latest).items()}
    load_pieces({name: pieces_of(tensor) for name, tensor in tensors.items()}, latest)
    return tensors


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if name not in QUIET}
        for line in read_metrics(run_dir)
    ]


def assert_same_run(first: Path, second: Path) -> None:
    mine, theirs = final_tensors(first), final_tensors(second)
    assert mine.keys() == theirs.keys()
    assert len(mine) > 50
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name
    assert lines(first) == lines(second)
    for run_dir in (first, second):
        steps = [line["step"] for line in read_metrics(run_dir)]
        assert steps == sorted(set(steps)), "a step has two lines"


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"batch": BatchConfig(GLOBAL_BATCH, 2)},
    "bf16": {"precision": Precision.BF16},
    "checkpointed": {"activation_checkpointing": ActivationCheckpointing.FULL},
    "transformer": {"name": "transformer++"},
}


# The regularised run in test_regularisation.py accumulates too.
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(name, marks=pytest.mark.slow)
        if name in ("accumulated", "transformer")
        else name
        for name in VARIANTS
    ],
)
def test_resumed_equals_uninterrupted(
    variant: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(**VARIANTS[variant])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(config, whole)
    for stop_step in (1, 3, 4) if variant == "plain" else (3,):
        outcome = train(config, cut, display=StopAt(stop_step))
        assert (outcome.progress.step, outcome.stopped_by) == (stop_step, signal.SIGINT)
    outcome = train(config, cut)
    assert (outcome.progress.step, outcome.stopped_by) == (6, None)
    assert outcome.progress.tokens == 6 * GLOBAL_BATCH * SEQUENCE
    assert_same_run(whole, cut)


@pytest.mark.slow
def test_two_threads_resume_too(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(steps=2, threads=2, checkpoint=CheckpointConfig(10))
    train(config, tmp_path / "whole")
    train(config, tmp_path / "cut", display=StopAt(1))
    train(config, tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_separated_documents_resume_too_and_change_the_result(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config()
    apart = replace(config, data=replace(config.data, separate_documents=True))
    train(config, tmp_path / "joined")
    train(apart, tmp_path / "apart")
    train(apart, tmp_path / "cut", display=StopAt(3, signal.SIGTERM))
    train(apart, tmp_path / "cut")
    assert_same_run(tmp_path / "apart", tmp_path / "cut")
    assert lines(tmp_path / "apart") != lines(tmp_path / "joined")


def test_a_finished_run_is_left_alone(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    train(config, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert any(path.parent.name == "model" for path in before)
    outcome = train(config, tmp_path)
    assert (outcome.progress.step, outcome.evaluation) == (6, None)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}


def test_a_lost_export_is_made_again(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(steps=2)
    train(config, tmp_path)
    exported = load_file(tmp_path / "model" / "model.safetensors")
    for path in (tmp_path / "model").iterdir():
        path.unlink()
    (tmp_path / "model").rmdir()
    train(config, tmp_path)
    again = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(exported[name], again[name]) for name in exported)


def test_fresh_starts_again(make_config: MakeConfig, tmp_path: Path) -> None:
    train(make_config(), tmp_path / "run")
    other = make_config(seed=6)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointMismatch, match="seed"):
        train(other, tmp_path / "run")
    train(other, tmp_path / "run", fresh=True)
    train(other, tmp_path / "new")
    assert_same_run(tmp_path / "run", tmp_path / "new")
    assert (tmp_path / "run" / "notes.txt").exists()


def test_fresh_refuses_what_is_not_a_run(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious").write_text("work of years")
    with pytest.raises(ConfigError, match=r"config\.json"):
        train(make_config(), tmp_path, fresh=True)
    assert (tmp_path / "model" / "precious").exists()


def test_another_configuration_is_refused_by_field(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(steps=2)
    train(config, tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    for section, change, expected in (
        ("model", {"window": 6}, "model.window = 6, but .* was made with 5"),
        ("optimizer", {"peak_learning_rate": 1e-4}, "peak_learning_rate = 0.0001, .* 0.003"),
        ("optimizer", {"weight_decay": 0.0}, "--change-schedule"),
        ("schedule", {"kind": "wsd"}, "schedule.kind = 'wsd', but .* 'linear'"),
        ("batch", {"global_batch_size": 3, "micro_batch_size": 3}, "global_batch_size = 3"),
        ("data", {"sequence_length": 12}, "data.sequence_length = 12, but .* 13"),
        ("", {"seed": 1}, "seed = 1, but .* 5"),
        ("", {"precision": "bf16"}, "precision = 'bf16', but .* 'fp32'"),
        ("", {"init_scheme": "standard"}, "init_scheme = 'standard'"),
    ):
        values = config.to_dict()
        (values[section] if section else values).update(change)
        with pytest.raises(CheckpointMismatch, match=expected):
            train(RunConfig.from_dict(values), tmp_path)
        assert (tmp_path / "config.json").read_bytes() == before


def test_fields_that_change_no_result_may_change(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    train(config, tmp_path, display=StopAt(3))
    torch.set_num_threads(1)
    changed = replace(
        config,
        batch=BatchConfig(GLOBAL_BATCH, 3),
        evaluation=EvaluationConfig(2, None),
        checkpoint=CheckpointConfig(1, 9),
        threads=None,
        device=Device.CPU,
    )
    assert train(changed, tmp_path).progress.step == 6


def test_other_data_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(steps=4)
    train(config, tmp_path / "run")
    other = replace(config, data=replace(config.data, directory=str(make_data(tmp_path, seed=9))))
    with pytest.raises(CheckpointMismatch, match=r"data\.directory .* other data"):
        train(other, tmp_path / "run")


def test_moved_data_is_the_same_data(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = make_data(tmp_path / "before")
    config = make_config(steps=4)
    config = replace(config, data=replace(config.data, directory=str(folder)))
    train(config, tmp_path / "run", display=StopAt(3))
    (tmp_path / "before").rename(tmp_path / "after")
    moved = replace(config.data, directory=str(tmp_path / "after" / "data"))
    assert train(replace(config, data=moved), tmp_path / "run").progress.step == 4


def test_schedule_may_change_when_asked(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(steps=4)
    train(config, tmp_path)
    longer = replace(
        config,
        schedule=ScheduleConfig(8 * GLOBAL_BATCH * SEQUENCE),
        optimizer=OptimizerConfig(peak_learning_rate=1e-3),
    )
    outcome = train(longer, tmp_path, change_schedule=True)
    assert outcome.progress.step == 8
    other_model = replace(longer, model=config.model.replace(window=6))
    with pytest.raises(CheckpointMismatch, match=r"model\.window"):
        train(other_model, tmp_path, change_schedule=True)


def test_a_signal_while_saving_loses_nothing(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = CheckpointStore.save

    def interrupted(self: CheckpointStore, *args: Any) -> Path:
        path = plain(self, *args)
        os.kill(os.getpid(), signal.SIGTERM)
        return path

    monkeypatch.setattr(CheckpointStore, "save", interrupted)
    config = make_config()
    outcome = train(config, tmp_path)
    assert (outcome.progress.step, outcome.stopped_by) == (2, signal.SIGTERM)
    store = CheckpointStore(tmp_path, config.checkpoint)
    assert store.steps() == [2]
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_signal_ends_at_once(make_config: MakeConfig, tmp_path: Path) -> None:
    class Impatient(StopAt):
        def step(self, step: int, *rest: Any) -> None:
            super().step(step)
            super().step(step)

    with pytest.raises(KeyboardInterrupt):
        train(make_config(), tmp_path, display=Impatient(3))
    assert CheckpointStore(tmp_path, CheckpointConfig()).steps() == [2]
    assert train(make_config(), tmp_path).progress.step == 6
