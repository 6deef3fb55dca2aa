"""What the loop computes: accumulation, overfitting, evaluation, metrics, and refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sambay.data import batch_source
from sambay.data.batches import read_batch
from sambay.data.shards import TokenDataset
from sambay.errors import ConfigError, DataError, SambayError
from sambay.files import WriteFailed
from sambay.model import LanguageModel, initialise
from sambay.model.folder import load_model_folder
from sambay.train import loop, trainer
from sambay.train.config import (
    BatchConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    ResilienceConfig,
    RunConfig,
    ScheduleConfig,
)
from sambay.train.loop import train
from sambay.train.metrics import MetricsLog, read_metrics
from sambay.train.optim import build_optimizer
from sambay.train.resilience import TrainingDiverged
from sambay.train.run_dir import claimed
from tests.tiny import tiny_config
from tests.train.conftest import GLOBAL_BATCH, SEQUENCE, make_data

MakeConfig = Callable[..., RunConfig]


@pytest.mark.parametrize(
    "micro_batch_size",
    [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)],
)
def test_accumulation_equals_one_big_batch(
    micro_batch_size: int, make_config: MakeConfig, tmp_path: Path
) -> None:
    whole = make_config(steps=3)
    split = replace(whole, batch=BatchConfig(GLOBAL_BATCH, micro_batch_size))
    train(whole, tmp_path / "whole")
    train(split, tmp_path / "split")
    for mine, theirs in zip(
        read_metrics(tmp_path / "split"), read_metrics(tmp_path / "whole"), strict=True
    ):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=2e-5)


def test_every_token_weighs_the_same_however_unequal_the_parts(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def partly_ignored(*args: Any, **options: Any) -> Any:
        batch = read_batch(*args, **options)
        labels = batch.labels.clone()
        labels[0, :-1] = -100
        labels[3] = -100
        return dataclasses.replace(batch, labels=labels)

    monkeypatch.setattr(batch_source, "read_batch", partly_ignored)
    gradients = []
    for size in (GLOBAL_BATCH, 1):
        run = make_config(steps=1, batch=BatchConfig(GLOBAL_BATCH, size))
        train(run, tmp_path / str(size))
        (line,) = read_metrics(tmp_path / str(size))
        gradients.append((line["loss"], line["gradient_norm"]))
    assert gradients[0] == pytest.approx(gradients[1], rel=2e-5)


def test_overfits_one_batch(data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A tiny SambaY memorises one batch of two rows."""

    def always_the_same(seed: int, positions: np.ndarray, num_samples: int) -> np.ndarray:
        return positions % 2

    monkeypatch.setattr(batch_source, "samples_at", always_the_same)
    vocab_size = TokenDataset.open(data, "train").vocab_size
    config = RunConfig(
        model=tiny_config("sambay", vocab_size=vocab_size),
        data=DataConfig(str(data), sequence_length=SEQUENCE),
        optimizer=OptimizerConfig(1e-2, weight_decay=0.0),
        schedule=ScheduleConfig(100 * 2 * SEQUENCE, warmup_tokens=5 * 2 * SEQUENCE),
        batch=BatchConfig(2, 2),
        evaluation=EvaluationConfig(1000, SEQUENCE),
        threads=1,
    )
    train(config, tmp_path)
    losses = [line["loss"] for line in read_metrics(tmp_path)]
    assert losses[0] > 4
    assert losses[-1] < 0.02


def test_evaluation_is_exact_over_its_tokens(make_config: MakeConfig, tmp_path: Path) -> None:
    """The last metrics line equals a computation window by window with the exported model."""
    config = make_config(evaluation=EvaluationConfig(100, None))
    outcome = train(config, tmp_path)
    dataset = TokenDataset.open(config.data.directory, "validation")
    model = load_model_folder(tmp_path / "model")
    nats, text = 0.0, b""
    for start in range(0, dataset.num_tokens - 1, SEQUENCE):
        count = min(SEQUENCE, dataset.num_tokens - 1 - start)
        ids = torch.from_numpy(dataset.read(start, count + 1).astype("int64"))
        logits = model(ids[None, :-1])[0].double()
        nats -= logits.log_softmax(-1)[torch.arange(count), ids[1:]].sum().item()
        text += dataset.text(start + 1, count)
    assert outcome.evaluation is not None
    assert outcome.evaluation.tokens == dataset.num_tokens - 1
    assert outcome.evaluation.text_bytes == len(text) > 1000
    assert outcome.evaluation.loss == pytest.approx(nats / (dataset.num_tokens - 1), rel=1e-5)
    bits = nats / math.log(2) / len(text)
    assert read_metrics(tmp_path)[-1]["validation_bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_metrics_have_one_line_per_logged_step(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(steps=7, logging=LoggingConfig(every_steps=3))
    train(config, tmp_path)
    lines = {line["step"]: line for line in read_metrics(tmp_path)}
    assert list(lines) == [3, 4, 6, 7]
    assert "loss" not in lines[4]
    assert "validation_loss" in lines[4]
    assert "validation_loss" in lines[7]
    names = {name for name in lines[3] if not name.startswith(("memory/", "gradient_norm/"))}
    assert names == {
        "step", "tokens", "seconds", "loss", "learning_rate", "gradient_norm", "tokens_per_second",
    }  # fmt: skip
    assert lines[3]["tokens"] == 3 * GLOBAL_BATCH * SEQUENCE


def test_tensorboard_gets_the_same_numbers(make_config: MakeConfig, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(make_config(steps=3, logging=LoggingConfig(tensorboard=True)), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("loss")}
    assert losses == {
        line["step"]: pytest.approx(line["loss"], rel=1e-6) for line in read_metrics(tmp_path)
    }


def test_a_nan_stops_with_a_diagnosis_and_keeps_the_checkpoint(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trainer.cross_entropy
    calls = 0

    def poisoned(h: torch.Tensor, *rest: Any, **options: Any) -> Any:
        nonlocal calls
        calls += torch.is_grad_enabled()
        return plain(
            h * math.nan if calls == 4 and torch.is_grad_enabled() else h, *rest, **options
        )

    monkeypatch.setattr(trainer, "cross_entropy", poisoned)
    config = make_config(resilience=ResilienceConfig(max_skips=0))
    with pytest.raises(TrainingDiverged, match=r"step 4: the loss is nan .*gradient of \w+") as got:
        train(config, tmp_path)
    assert "step-00000002" in str(got.value)
    assert "\n" not in str(got.value)
    monkeypatch.undo()
    torch.set_num_threads(1)
    assert train(config, tmp_path).progress.step == 6
    train(config, tmp_path / "undisturbed")
    undisturbed = read_metrics(tmp_path / "undisturbed")
    assert read_metrics(tmp_path)[-1]["loss"] == undisturbed[-1]["loss"]


def test_only_matrices_decay(data: Path) -> None:
    model = LanguageModel(tiny_config("sambay+da"))
    initialise(model, seed=0)
    optimizer = build_optimizer(
        model, OptimizerConfig(1e-3, weight_decay=0.3, matrix_learning_rate_factor=2.0)
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["weight_decay"]: group for group in optimizer.param_groups}
    decayed = {names[id(parameter)] for parameter in groups[0.3]["params"]}
    rest = {names[id(parameter)] for parameter in groups[0.0]["params"]}
    assert decayed | rest == set(names.values())
    assert all(name.endswith("proj.weight") for name in decayed)
    assert not any("proj.weight" in name for name in rest)
    assert "embedding.weight" in rest
    assert (groups[0.3]["learning_rate_factor"], groups[0.0]["learning_rate_factor"]) == (2.0, 1.0)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("data", {"directory": "nowhere"}, "nowhere has no manifest"),
        ("data", {"sequence_length": 100_000}, "data.sequence_length = 100000"),
        ("model", {"vocab_size": 301}, "set model.vocab_size=2"),
    ],
)
def test_mistakes_are_found_before_work_starts(
    section: str, change: dict[str, Any], message: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    values = make_config(steps=100_000).to_dict()
    values[section].update(change)
    with pytest.raises(SambayError, match=message):
        train(RunConfig.from_dict(values), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_shard_is_named_before_work_starts(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    folder = make_data(tmp_path)
    shard = folder / "train" / "00000.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    config = make_config()
    config = replace(config, data=replace(config.data, directory=str(folder)))
    with pytest.raises(DataError, match=r"00000\.bin"):
        train(config, tmp_path / "run")
    shard.write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"00000\.bin"):
        train(config, tmp_path / "run")


def test_a_second_process_is_kept_out(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(steps=1)
    with claimed(tmp_path), pytest.raises(ConfigError, match="in use by process"):
        train(config, tmp_path)
    train(config, tmp_path)


def test_unwritable_run_directory(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SambayError, match="--run-dir"):
        train(make_config(), tmp_path / "file" / "run")


def test_too_little_disk_space_is_found_before_work_starts(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConfigError, match=r"checkpoint\.keep = 2"):
        train(make_config(), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_config_and_tokenizer_are_in_the_run_directory(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(steps=1)
    train(config, tmp_path)
    assert RunConfig.from_dict(json.loads((tmp_path / "config.json").read_text())) == config
    for folder in (tmp_path, tmp_path / "model"):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            content = (folder / name).read_bytes()
            assert content == (Path(config.data.directory) / name).read_bytes()


def test_other_peoples_files_are_not_overwritten(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(steps=1)
    (tmp_path / "config.json").write_text('{"mine": 1}')
    with pytest.raises(ConfigError, match=r"config\.json"):
        train(config, tmp_path)
    assert (tmp_path / "config.json").read_text() == '{"mine": 1}'
    folder = Path(config.data.directory)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(ConfigError, match="holds prepared data"):
        train(config, folder)
    after = sorted(path.name for path in folder.iterdir() if path.name != ".lock")
    assert after == before


def test_damaged_metrics_are_named(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(steps=3)
    train(config, tmp_path)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines) + '{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    path.write_text(lines[0] + "\0\0\n" + lines[2])
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2"):
        read_metrics(tmp_path)


def test_full_disk_while_writing_metrics(make_config: MakeConfig, tmp_path: Path) -> None:
    if not Path("/dev/full").is_char_device():
        pytest.skip("no /dev/full")
    with MetricsLog(tmp_path, last_step=0) as metrics:
        metrics._file.close()
        metrics._file = open("/dev/full", "a", encoding="utf-8")  # noqa: SIM115
        with pytest.raises(WriteFailed, match=r"metrics\.jsonl: No space left on device"):
            metrics.write({"step": 1})


def test_too_little_memory_is_a_warning(
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(loop, "available_bytes", lambda device: 1000)
    train(make_config(steps=1), tmp_path)
    assert "lower batch.micro_batch_size" in capsys.readouterr().err
