"""What a run measures: norms by role, learning rates, MFU, memory, and the lines it writes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sambay.errors import ConfigError, DataError
from sambay.model.roles import Role, parameter_roles
from sambay.spec.footprint import training_flops
from sambay.train import trainer
from sambay.train.config import (
    BatchConfig,
    CheckpointConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    Precision,
    ResilienceConfig,
    RunConfig,
    ScheduleConfig,
)
from sambay.train.distributed import World
from sambay.train.environment import read_environment
from sambay.train.loop import train
from sambay.train.metrics import MetricsLog, read_metrics, readable_metrics
from sambay.train.norms import learning_rate_metrics, role_norm_metrics, role_norms
from sambay.train.optim import build_optimizer, gradient_norm
from sambay.train.throughput import Gauges, memory_bytes, peak_flops
from tests.tiny import random_ids, tiny_model
from tests.train.conftest import SEQUENCE
from tests.train.processes import together

MakeConfig = Callable[..., RunConfig]
CPU = torch.device("cpu")


@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": False}])
def test_norms_by_role_are_those_of_their_gradients(fields: dict[str, Any]) -> None:
    model = tiny_model("sambay", **fields)
    with torch.no_grad():  # a head of its own begins at zero
        model.head_weight.add_(0.1)
    model(random_ids(2, 7)).square().sum().backward()
    squares = dict.fromkeys(Role, 0.0)
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        squares[roles[name]] += float(parameter.grad.square().sum())
    expected = {role: math.sqrt(square) for role, square in squares.items() if square}
    assert (Role.OUTPUT in expected) == (not model.config.tie_embeddings)
    norms = role_norms(model)
    assert {role: float(norm) for role, norm in norms.items()} == pytest.approx(expected, rel=1e-6)
    total = torch.stack(list(norms.values())).norm()
    assert float(total) == pytest.approx(float(gradient_norm(model.parameters())), rel=1e-6)
    names = {f"gradient_norm/{role.value}" for role in expected}
    assert set(role_norm_metrics(model)) == names


def test_roles_without_gradients_are_left_out() -> None:
    model = tiny_model("sambay")
    assert role_norms(model) == {}
    assert role_norm_metrics(model) == {}


@pytest.mark.parametrize(
    "parallel",
    # test_tensor_parallel compares the norms of parts with those of the whole.
    [ParallelConfig(shard=2), pytest.param(ParallelConfig(tensor=2), marks=pytest.mark.slow)],
)
def test_norms_by_role_over_two_processes(
    parallel: ParallelConfig, make_config: MakeConfig, tmp_path: Path
) -> None:
    tokens = 4 * SEQUENCE
    config = make_config(
        batch=BatchConfig(4, 4),
        schedule=ScheduleConfig(2 * tokens),
        checkpoint=CheckpointConfig(100),
    )
    train(config, tmp_path / "one")
    shared = replace(config, parallel=parallel)
    together(2, lambda: train(shared, tmp_path / "two"), tmp_path / "answers")
    one, two = (read_metrics(tmp_path / name)[-1] for name in ("one", "two"))
    names = [name for name in one if name.startswith("gradient_norm")]
    assert len(names) == 5
    assert [two[name] for name in names] == pytest.approx([one[name] for name in names], rel=1e-4)
    environment = read_environment(tmp_path / "two")
    assert environment is not None
    assert [start["processes"] for start in environment.starts] == [2]


def test_learning_rates_that_differ_are_named() -> None:
    model = tiny_model("sambay")
    optimizer = build_optimizer(model, OptimizerConfig(1e-3))
    assert learning_rate_metrics(model, optimizer, 2e-4) == {"learning_rate": 2e-4}
    optimizer = build_optimizer(model, OptimizerConfig(1e-3, matrix_learning_rate_factor=0.25))
    expected = {"learning_rate": 2e-4, "learning_rate/matrix": 5e-5}
    assert learning_rate_metrics(model, optimizer, 2e-4) == expected


def test_the_peak_is_stated_or_known_but_never_guessed(make_config: MakeConfig) -> None:
    plain = make_config()
    bf16 = replace(plain, precision=Precision.BF16)
    assert peak_flops(bf16, "NVIDIA H200") == 989e12
    assert peak_flops(bf16, "NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops(bf16, "NVIDIA H100 PCIe") == 756e12
    assert peak_flops(bf16, "NVIDIA H100 80GB HBM3") == 989e12
    for device in ("cpu", "NVIDIA GeForce GTX 1080", "NVIDIA H200 MIG 1g.18gb", "NVIDIA XH200X"):
        assert peak_flops(bf16, device) is None
    assert peak_flops(plain, "NVIDIA H200") is None  # float32 has another
    stated = replace(plain, logging=LoggingConfig(peak_flops=2e9))
    assert peak_flops(stated, "cpu") == 2e9
    with pytest.raises(ConfigError, match=r"logging\.peak_flops = 0"):
        LoggingConfig(peak_flops=0)


def test_mfu_is_what_was_computed_over_what_could_be(make_config: MakeConfig) -> None:
    config = make_config(logging=LoggingConfig(peak_flops=3e9))
    values = Gauges(config, World(CPU)).metrics(seconds=0.5)
    flops = training_flops(config.model, SEQUENCE) * config.batch.global_batch_size
    assert values["mfu"] == pytest.approx(flops / 0.5 / 3e9, rel=1e-12)
    assert values["tokens_per_second"] == config.tokens_per_step * 2
    assert "mfu" not in Gauges(make_config(), World(CPU)).metrics(seconds=0.5)
    # What separate documents see of each other is unknown, so that attention is not counted.
    apart = replace(config, data=replace(config.data, separate_documents=True))
    without = training_flops(config.model, SEQUENCE, attention=False) / SEQUENCE
    assert Gauges(apart, World(CPU)).flops_per_token == without


def test_memory_grows_with_what_is_held() -> None:
    before = memory_bytes(CPU)
    held = torch.ones(2**26)  # 256 MiB, written
    after = memory_bytes(CPU)
    assert after["host_peak"] >= held.nbytes
    if "host" in before:
        assert after["host"] - before["host"] > held.nbytes / 2
        assert after["host_peak"] >= after["host"] * 0.99
    assert "device_peak" not in after


def test_a_run_logs_what_it_says(make_config: MakeConfig, tmp_path: Path) -> None:
    optimizer = OptimizerConfig(3e-3, matrix_learning_rate_factor=0.5)
    logging = LoggingConfig(every_steps=2, peak_flops=1e12)
    train(make_config(steps=3, optimizer=optimizer, logging=logging), tmp_path)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [2, 3]
    for line in lines:
        parts = [line[f"gradient_norm/{role}"] for role in ("matrix", "vector", "embedding", "ssm")]
        assert math.hypot(*parts) == pytest.approx(line["gradient_norm"], rel=1e-5)
        assert line["learning_rate/matrix"] == line["learning_rate"] / 2
        assert 0 < line["mfu"] < 1
        assert line["memory/host_peak"] > 2**20
        assert "skipped" not in line


def test_a_skipped_step_is_counted_and_its_line_stays_json(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trainer.cross_entropy
    calls = 0

    def poisoned(h: torch.Tensor, *rest: Any, **options: Any) -> Any:
        nonlocal calls
        calls += torch.is_grad_enabled()
        is_bad = calls == 2 and torch.is_grad_enabled()
        return plain(h * math.nan if is_bad else h, *rest, **options)

    monkeypatch.setattr(trainer, "cross_entropy", poisoned)
    train(make_config(steps=3, resilience=ResilienceConfig(max_skips=2)), tmp_path)

    def refuse(text: str) -> float:
        raise AssertionError(text)

    texts = (tmp_path / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(text, parse_constant=refuse) for text in texts]
    assert [line.get("skipped") for line in lines] == [None, 1, 1]
    assert [line["loss"] is None for line in lines] == [False, True, False]
    assert lines[1]["gradient_norm"] is None
    assert lines[1]["learning_rate"] > 0


def test_lines_that_cannot_be_read_are_told_apart_from_one_being_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\n[]\n{"loss": 2}\n\n{"step": 5}\n{"step": 6')
    assert readable_metrics(tmp_path) == ([{"step": 1}, {"step": 5}], [2, 3, 4, 5])
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2 is damaged"):
        read_metrics(tmp_path)
    for content in (b"", b'{"step": 1'):
        path.write_bytes(content)
        assert readable_metrics(tmp_path) == ([], [])
    path.unlink()
    assert readable_metrics(tmp_path) == ([], [])


def test_continuing_drops_the_lines_that_come_again(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, last_step=0) as metrics:
        for step in (1, 2, 3):
            metrics.write({"step": step, "loss": 1 / step})
    with MetricsLog(tmp_path, last_step=2) as metrics:
        metrics.write({"step": 3, "loss": math.inf})
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": None},
    ]  # fmt: skip


def test_every_start_is_recorded_under_one_identity(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(steps=2)
    train(config, tmp_path)
    first = read_environment(tmp_path)
    longer = replace(config, schedule=replace(config.schedule, total_tokens=4 * 6 * SEQUENCE))
    train(longer, tmp_path, change_schedule=True)
    second = read_environment(tmp_path)
    assert first is not None
    assert second is not None
    assert [start["step"] for start in second.starts] == [0, 2]
    assert second.run_id == first.run_id
    assert second.starts[0] == first.starts[0]
    assert second.starts[0]["torch"] == torch.__version__
    assert second.starts[0]["threads"] == 1
    train(config, tmp_path, fresh=True)
    third = read_environment(tmp_path)
    assert third is not None
    assert third.run_id != first.run_id
    assert len(third.starts) == 1
    (tmp_path / "environment.json").write_text("{")
    with pytest.raises(DataError, match=r"environment\.json is damaged"):
        read_environment(tmp_path)
