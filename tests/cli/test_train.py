"""`sambay train` from the outside: dry run, signals, resuming, messages."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import pytest

from sambay.cli.main import main
from sambay.data.manifest import Manifest
from sambay.train.metrics import read_metrics
from tests.train.conftest import make_data

RECIPE = """
from sambay.spec import presets
from sambay.train.config import *

def tiny():
    return RunConfig(
        model=presets.build("sambay", 8, vocab_size={vocab_size}, hidden_size=24, head_dim=6,
                            num_heads=4, num_kv_heads=2, window=5),
        data=DataConfig({directory!r}, sequence_length=13),
        optimizer=OptimizerConfig(3e-3),
        schedule=ScheduleConfig(4 * 78),
        batch=BatchConfig(6, 6),
        evaluation=EvaluationConfig(2, 64),
        threads=1,
    )
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("a folder with spaces")
    data = make_data(folder)
    vocab_size = Manifest.read(data).vocab_size
    file = folder / "mine.py"
    file.write_text(RECIPE.format(vocab_size=vocab_size, directory=str(data)))
    return f"{file}:tiny"


def test_dry_run_says_what_will_happen_and_does_nothing(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    words = ["train", recipe, "optimizer.weight_decay=0.25", "--run-dir", str(run_dir)]
    assert main([*words, "--dry-run"]) == 0
    output = capsys.readouterr().out
    for text in (
        "2x(M S) M F G C", "78 tokens per step", "4 steps, 312 tokens", "tokens per parameter",
        "weight decay 0.25", "weights", "gradients", "optimiser", "activations", "MB",
        "training tokens", "validation tokens", "per checkpoint",
    ):  # fmt: skip
        assert text in output, text
    assert not run_dir.exists()


def _peak_memory() -> int:
    """In bytes, of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def test_dry_run_of_a_large_model_makes_no_weights_and_checks_the_data(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The weights alone would take 4.3 GB."""
    before = _peak_memory()
    assert main(["train", "sambay_1b", "--dry-run", "data.directory=nowhere"]) == 2
    assert _peak_memory() - before < 500e6
    output, errors = capsys.readouterr()
    assert "1,065,818,688" in output
    assert "48,334 steps" in output
    assert errors.startswith("error: nowhere has no manifest.json")
    assert errors.count("\n") == 1


def test_trains_and_says_so_then_finds_it_finished(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "my run"
    words = ["train", recipe, "--run-dir", str(run_dir), "logging.every_steps=2", "seed=3"]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert "finished 4 steps, 312 tokens" in captured.out
    assert "bits/byte" in captured.out
    assert "step 4/4" in captured.err
    config = json.loads((run_dir / "config.json").read_text())
    assert (config["seed"], config["logging"]["every_steps"]) == (3, 2)
    assert [line["step"] for line in read_metrics(run_dir)] == [2, 4]
    assert main(words) == 0
    assert "already finished at step 4" in capsys.readouterr().out
    assert main([*words[:-1], "seed=4"]) == 2
    assert capsys.readouterr().err.startswith("error: seed = 4, but ")
    again = ["train", str(run_dir), "--run-dir", str(tmp_path / "again")]
    assert main(again) == 0
    first, second = read_metrics(run_dir), read_metrics(tmp_path / "again")
    assert [line["loss"] for line in first] == [line["loss"] for line in second]


def test_default_run_directory_is_named_after_the_recipe(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", recipe]) == 0
    assert (tmp_path / "runs" / "tiny" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_signals_save_and_tell_how_to_continue(
    number: signal.Signals, recipe: str, tmp_path: Path
) -> None:
    """In a fork of this process, which has imported torch already."""
    run_dir, output, errors = tmp_path / "run", tmp_path / "output", tmp_path / "errors"
    words = ["train", recipe, "schedule.total_tokens=1e6", "--run-dir", str(run_dir)]
    child = os.fork()
    if child == 0:
        code = 99
        try:
            with (
                output.open("w") as out, contextlib.redirect_stdout(out),
                errors.open("w") as err, contextlib.redirect_stderr(err),
            ):  # fmt: skip
                code = main(words)
        finally:
            os._exit(code)
    deadline = time.monotonic() + 120
    while len(read_metrics(run_dir)) < 3:
        assert time.monotonic() < deadline
        assert os.waitpid(child, os.WNOHANG) == (0, 0), errors.read_text()
        time.sleep(0.02)
    os.kill(child, number)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + number
    printed = output.read_text()
    assert "run the same command to continue" in printed
    assert "Traceback" not in errors.read_text()
    stopped = int(printed.partition("stopped at step ")[2].partition(";")[0])
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step-{stopped:08d}"]
    assert read_metrics(run_dir)[-1]["step"] == stopped


def test_fields_without_effect_are_pointed_out(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = ["schedule.decay_fraction=0.5", "schedule.minimum_factor=0.1"]
    for kind, expected in (("wsd", 0), ("linear", 1), ("constant", 2)):
        assert main(["train", recipe, *fields, f"schedule.kind={kind}", "--dry-run"]) == 0
        errors = capsys.readouterr().err
        assert errors.count("warning: schedule.") == errors.count("\n") == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["demo_sambey"], "did you mean 'demo_sambay'"),
        (["demo_sambay", "model.windw=3"], "did you mean 'model.window'"),
        (["demo_sambay", "model.layer_pattern=2xG"], "layer_pattern"),
        (["demo_sambay", "model.window=0"], "model.window"),
        (["demo_sambay", "data.directory=nowhere"], "nowhere has no manifest.json"),
        (["demo_sambay", "batch.micro_batch_size=3"], "batch.micro_batch_size = 3"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_mistakes(
    words: list[str], message: str, dry: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert main(["train", *words, "--run-dir", str(run_dir), *(["--dry-run"] if dry else [])]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1
    assert not run_dir.exists()


def test_vocabulary_of_the_data(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", recipe, "model.vocab_size=999", "--run-dir", str(tmp_path)]) == 2
    assert "model.vocab_size = 999, but the tokenizer in" in capsys.readouterr().err
