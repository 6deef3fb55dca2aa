"""Checkpoints: whole or absent after a kill at any point, kept by policy, refused when damaged."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sambay.cli.main import main
from sambay.errors import CheckpointMismatch
from sambay.files import WriteFailed
from sambay.hf.loading import load_model
from sambay.model import LanguageModel, initialise
from sambay.train import checkpoint
from sambay.train.checkpoint import CheckpointStore, Progress, restore
from sambay.train.config import CheckpointConfig, RunConfig
from sambay.train.export import export_model, load_checkpoint_model
from sambay.train.loop import train
from sambay.train.optim import build_optimizer
from sambay.train.pieces import stored_shapes
from sambay.train.same_run import check_same_run
from tests.tiny import random_ids
from tests.train.test_resume import StopAt, assert_same_run

MakeConfig = Callable[..., RunConfig]
Parts = tuple[RunConfig, LanguageModel, torch.optim.AdamW]


@pytest.fixture
def parts(make_config: MakeConfig) -> Parts:
    config = make_config()
    model = LanguageModel(config.model)
    initialise(model, seed=config.seed)
    return config, model, build_optimizer(model, config.optimizer)


def save(store: CheckpointStore, step: int, parts: Parts) -> None:
    config, model, optimizer = parts
    with torch.no_grad():
        model.embedding.weight[0, 0] = step
    store.save(Progress(step, step * 10, 1.0), model, optimizer, config, "hash")
    store.wait()


def stored_step(path: Path, parts: Parts) -> int:
    config, _, _ = parts
    model = LanguageModel(config.model)
    check_same_run(path, config, "hash")
    progress = restore(path, model, build_optimizer(model, config.optimizer))
    assert int(model.embedding.weight[0, 0]) == progress.step
    return progress.step


@pytest.mark.parametrize(
    ("keep", "every", "expected"),
    [(1, None, [7]), (3, None, [5, 6, 7]), (2, 3, [3, 6, 7]), (9, None, [1, 2, 3, 4, 5, 6, 7])],
)
def test_keep_policy(
    keep: int, every: int | None, expected: list[int], parts: Parts, tmp_path: Path
) -> None:
    store = CheckpointStore(tmp_path, CheckpointConfig(1, keep, every))
    for step in range(1, 8):
        save(store, step, parts)
    assert store.steps() == expected
    assert sorted(path.name for path in store.folder.iterdir()) == [
        f"step-{step:08d}" for step in expected
    ]


def _fork_and_kill_at(event: int, action: Callable[[], None]) -> bool:
    """Run `action` in a child that kills itself at its n-th file operation; whether it did."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == event:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **options)

            return call

        os.fsync, os.replace = counted(os.fsync), counted(os.replace)
        Path.rename = counted(Path.rename)  # type: ignore[method-assign]
        os.unlink, os.rmdir = counted(os.unlink), counted(os.rmdir)
        checkpoint.save_pieces = counted(checkpoint.save_pieces)
        checkpoint.sha256_of = counted(checkpoint.sha256_of)
        action()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("stride", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_file_operation_of_a_save(stride: int, parts: Parts, tmp_path: Path) -> None:
    """Before publication the old checkpoint is the latest, after it the new one; both load."""
    seen = []
    save(CheckpointStore(tmp_path / "before", CheckpointConfig(1, keep=1)), 4, parts)
    for event in range(1, 100, stride):
        shutil.copytree(tmp_path / "before", tmp_path / str(event))
        store = CheckpointStore(tmp_path / str(event), CheckpointConfig(1, keep=1))

        def save_the_next(store: CheckpointStore = store) -> None:
            save(store, 5, parts)

        was_killed = _fork_and_kill_at(event, save_the_next)
        latest = store.latest()
        assert latest is not None
        seen.append(stored_step(latest, parts))
        store.clean()
        assert all(path.name.startswith("step-") for path in store.folder.iterdir())
        save(store, 6, parts)
        assert store.steps() == [6]
        if not was_killed:
            break
    else:
        pytest.fail("the save never ended")
    assert len(seen) > 12 // stride
    assert seen == sorted(seen)
    assert set(seen) == {4, 5}


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_ends_like_an_undisturbed_one(
    times: int, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(steps=400, checkpoint=CheckpointConfig(1, keep=1))
    store = CheckpointStore(tmp_path / "killed", config.checkpoint)
    generator = random.Random(1)
    reached = 0
    for _ in range(times):
        child = os.fork()
        if child == 0:
            try:
                train(config, tmp_path / "killed")
            finally:
                os._exit(0)
        deadline = time.monotonic() + 200
        while max(store.steps(), default=0) < reached + 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(generator.random() * 0.1)
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, "it ended by itself"
        assert max(store.steps()) >= reached + 3
        reached = max(store.steps())
    assert 3 * times <= reached < 400
    short = replace(config, schedule=replace(config.schedule, total_tokens=(reached + 2) * 78))
    train(short, tmp_path / "killed", change_schedule=True)
    # The schedule was changed for the last two steps only, so run the comparison in two parts.
    train(config, tmp_path / "whole", display=StopAt(reached))
    train(short, tmp_path / "whole", change_schedule=True)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def _limited(limit: int, action: Callable[[], None]) -> None:
    """Run with a limit on file sizes: writing beyond it fails like a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        action()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [10, 4000, 200_000])
def test_a_failed_write_leaves_the_last_checkpoint(
    limit: int, parts: Parts, tmp_path: Path
) -> None:
    store = CheckpointStore(tmp_path, CheckpointConfig(1, keep=1))
    save(store, 1, parts)
    with pytest.raises(WriteFailed, match="cannot write"):
        _limited(limit, lambda: save(store, 2, parts))
    assert [path.name for path in store.folder.iterdir()] == ["step-00000001"]
    assert stored_step(store.path(1), parts) == 1
    save(store, 2, parts)
    assert store.steps() == [2]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_is_named(
    asynchronous: bool, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = CheckpointStore(tmp_path, CheckpointConfig(asynchronous=asynchronous))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteFailed, match=r"the disk is full; free some space") as caught:
        save(store, 1, parts)
    assert "\n" not in str(caught.value)
    assert list(store.folder.iterdir()) == []


def test_tied_weights_are_stored_once(parts: Parts, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, CheckpointConfig())
    save(store, 1, parts)
    names = {name for name, _ in parts[1].named_parameters()}
    kinds = ("model", "exp_avg", "exp_avg_sq")
    stored = stored_shapes(store.path(1)).keys()
    assert set(stored) == {f"{kind}.{name}" for kind in kinds for name in names}
    assert "model.embedding.weight" in stored
    assert "model.head.weight" not in stored


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_damage_is_named(name: str, damage: str, parts: Parts, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, CheckpointConfig())
    save(store, 1, parts)
    file = store.path(1) / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2 if name != "state.json" else 0] ^= 1
    file.write_bytes(content[:-40] if damage == "cut" else content)
    if damage == "missing":
        file.unlink()
    with pytest.raises(CheckpointMismatch, match=rf"{name} is .*remove .*step-00000001"):
        stored_step(store.path(1), parts)


def test_half_a_checkpoint_under_a_temporary_name_is_ignored(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(steps=2)
    half = tmp_path / "checkpoints" / ".step-00000009.new.abc"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    train(config, tmp_path)
    assert not half.exists()
    assert CheckpointStore(tmp_path, config.checkpoint).steps() == [2]


def test_model_from_run_directory_checkpoint_and_folder(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(steps=3)
    train(config, tmp_path)
    ids = random_ids(2, 9)
    logits = []
    newest = CheckpointStore(tmp_path, config.checkpoint).latest()
    assert newest is not None
    for path in (tmp_path, newest, tmp_path / "model"):
        model, model_config, tokenizer_file = load_checkpoint_model(path)
        assert model_config == config.model
        assert model.head_weight is model.embedding.weight
        assert not model.training
        assert tokenizer_file.exists()
        with torch.no_grad():
            logits.append(model(ids))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    shutil.rmtree(tmp_path / "checkpoints")
    model, _, _ = load_checkpoint_model(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(ids), logits[0])


def test_export_on_demand(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an unfinished run, in readings of a few tensors, and by the command."""
    run_dir = tmp_path / "run"
    train(make_config(), run_dir, display=StopAt(3))
    assert not (run_dir / "model").exists()
    folder = export_model(run_dir, tmp_path / "elsewhere")
    assert main(["train", str(run_dir), "--export-only"]) == 0
    assert str(run_dir / "model") in capsys.readouterr().out
    model, _, _ = load_checkpoint_model(run_dir)
    for path in (folder, run_dir / "model"):
        exported = load_model(path)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, exported.get_parameter(name)), name
    with pytest.raises(CheckpointMismatch, match="has no checkpoint to export"):
        export_model(tmp_path)


@pytest.mark.parametrize("path", ["", "nothing", "checkpoints"])
def test_nothing_to_load_is_explained(path: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointMismatch, match="holds no model; give a run directory"):
        load_checkpoint_model(tmp_path / path)
