"""Sinks get what metrics.jsonl gets, are missed before training begins, and never end a run."""

from __future__ import annotations

import importlib.machinery
import json
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sambay.cli.main import main
from sambay.errors import ConfigError, MissingPackage
from sambay.train import sinks
from sambay.train.config import LoggingConfig, RunConfig, Sink
from sambay.train.display import Display
from sambay.train.loop import train
from sambay.train.metrics import read_metrics
from sambay.train.sinks import SinkFailed
from tests.train.processes import together
from tests.train.test_resume import StopAt

MakeConfig = Callable[..., RunConfig]
TOOLS = (Sink.TRACKIO, Sink.WANDB)


class FakeRun:
    """A run of a tool that remembers what it was told, and can be made to fail."""

    def __init__(self, options: dict[str, Any], fail_at: int | None) -> None:
        self.options, self._fail_at = options, fail_at
        self.logged: dict[int, dict[str, float]] = {}
        self.axes: list[tuple[str, str | None]] = []
        self.is_finished = False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes.append((name, step_metric))

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        values = dict(values)
        number = int(values.pop("step")) if step is None else step
        if number == self._fail_at:
            raise ConnectionError("the server is gone\nand so is the rest")
        self.logged[number] = values

    def finish(self) -> None:
        self.is_finished = True


class FakeTool:
    """Stands in for a package; `runs` are those begun, in order."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs: list[FakeRun] = []
        self.fail_at: int | None = None
        self.refusal: Exception | None = None
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.init = self._init
        monkeypatch.setitem(sys.modules, name, module)

    def _init(self, **options: Any) -> FakeRun:
        if self.refusal is not None:
            raise self.refusal
        self.runs.append(FakeRun(options, self.fail_at))
        return self.runs[-1]


class Messages(Display):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


def expected(run_dir: Path) -> dict[int, dict[str, float]]:
    return {
        line["step"]: {name: value for name, value in line.items() if name != "step"}
        for line in read_metrics(run_dir)
    }


@pytest.mark.parametrize("sink", TOOLS)
def test_a_tool_gets_every_number_and_continues_its_run(
    sink: Sink, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tool = FakeTool(sink.value, monkeypatch)
    config = make_config(steps=4, logging=LoggingConfig(sinks=(sink,), project="mine"))
    run_dir = tmp_path / "first run"
    train(config, run_dir, display=StopAt(3, signal.SIGTERM))
    train(config, run_dir)
    before, after = tool.runs
    assert before.is_finished
    assert after.is_finished
    assert before.logged | after.logged == expected(run_dir)
    assert list(after.logged) == [4]
    run_id = json.loads((run_dir / "environment.json").read_text())["run_id"]
    for run in tool.runs:
        assert run.options["project"] == "mine"
        assert run.options["name"] == f"first run-{run_id}"
        assert run.options["resume"] == "allow"
        assert RunConfig.from_dict(run.options["config"]) == config
    if sink is Sink.WANDB:
        assert after.options["id"] == run_id
        assert after.options["mode"] == "offline"
        assert Path(after.options["dir"]) == run_dir
        assert ("*", "step") in after.axes
    train(config, run_dir, fresh=True)
    assert tool.runs[-1].options["name"] != after.options["name"]


def test_wandb_goes_online_only_if_its_environment_says_so(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = FakeTool("wandb", monkeypatch)
    monkeypatch.setenv("WANDB_MODE", "online")
    train(make_config(steps=1, logging=LoggingConfig(sinks=(Sink.WANDB,))), tmp_path)
    assert tool.runs[0].options["mode"] == "online"


def test_a_tool_that_fails_is_left_behind(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trackio, wandb = FakeTool("trackio", monkeypatch), FakeTool("wandb", monkeypatch)
    trackio.fail_at = 2
    display = Messages()
    config = make_config(steps=4, logging=LoggingConfig(sinks=TOOLS))
    assert train(config, tmp_path, display=display).progress.step == 4
    assert list(trackio.runs[0].logged) == [1]
    assert list(wandb.runs[0].logged) == [1, 2, 3, 4]
    assert list(expected(tmp_path)) == [1, 2, 3, 4]
    warnings = [text for text in display.texts if text.startswith("warning: trackio")]
    assert len(warnings) == 1
    assert "the server is gone" in warnings[0]
    assert "\n" not in warnings[0]


def test_a_tool_that_refuses_is_an_error_before_the_first_step(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trackio, wandb = FakeTool("trackio", monkeypatch), FakeTool("wandb", monkeypatch)
    wandb.refusal = PermissionError("no key was given")
    config = make_config(logging=LoggingConfig(sinks=TOOLS))
    with pytest.raises(SinkFailed, match=r"logging\.sinks: wandb .*no key was given") as caught:
        train(config, tmp_path)
    assert "\n" not in str(caught.value)
    assert trackio.runs[0].is_finished
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("sink", Sink)
def test_a_missing_package_is_named_before_anything_is_written(
    sink: Sink, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "_is_installed", lambda package: package != sink.value)
    config = make_config(logging=LoggingConfig(sinks=(sink,)))
    with pytest.raises(MissingPackage, match=rf"{sink.value}.*pip install \"sambay\["):
        train(config, tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_installed_is_what_can_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sinks._is_installed("json")
    assert not sinks._is_installed("no_such_package_at_all")
    monkeypatch.setitem(sys.modules, "json", None)
    assert not sinks._is_installed("json")
    (tmp_path / "only_a_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not sinks._is_installed("only_a_folder")


def test_a_dry_run_misses_packages_too(
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    recipe = tmp_path / "config.json"
    recipe.write_text(json.dumps(make_config().to_dict()))
    assert main(["train", str(recipe), "logging.sinks=trackio", "--dry-run"]) == 2
    assert "needs the package 'trackio'" in capsys.readouterr().err
    assert main(["train", str(recipe), "logging.sinks=trackoi", "--dry-run"]) == 2
    assert "did you mean 'trackio'" in capsys.readouterr().err


def test_sinks_are_named_once_and_tensorboard_has_its_own_field() -> None:
    with pytest.raises(ConfigError, match=r"logging\.sinks.*each once"):
        LoggingConfig(sinks=(Sink.WANDB, Sink.WANDB))
    assert LoggingConfig(tensorboard=True).all_sinks == (Sink.TENSORBOARD,)
    both = LoggingConfig(tensorboard=True, sinks=(Sink.WANDB, Sink.TENSORBOARD))
    assert both.all_sinks == (Sink.WANDB, Sink.TENSORBOARD)


def test_only_the_first_process_speaks_to_a_tool(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = FakeTool("trackio", monkeypatch)
    config = make_config(steps=2, logging=LoggingConfig(sinks=(Sink.TRACKIO,)))

    def action() -> list[int]:
        train(config, tmp_path / "run")
        return [step for run in tool.runs for step in run.logged]

    assert together(2, action, tmp_path / "answers") == [[1, 2], []]


def test_the_real_trackio_keeps_a_continued_run_together(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    config = make_config(steps=4, logging=LoggingConfig(sinks=(Sink.TRACKIO,), project="real"))
    train(config, tmp_path / "run", display=StopAt(3, signal.SIGTERM))
    train(config, tmp_path / "run")
    (name,) = storage.get_runs("real")
    losses = {log["step"]: log["loss"] for log in storage.get_logs("real", name)}
    assert losses == {line["step"]: line["loss"] for line in read_metrics(tmp_path / "run")}
