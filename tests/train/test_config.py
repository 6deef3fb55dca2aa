"""Run configurations: validation, JSON round trip, and messages that name field and remedy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sambay.errors import ConfigError
from sambay.recipes.catalogue import RECIPES
from sambay.recipes.demo import demo_sambay
from sambay.train.config import (
    ActivationCheckpointing,
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    OnExceed,
    OptimizerConfig,
    ParallelConfig,
    RegularisationConfig,
    ResilienceConfig,
    RunConfig,
    ScheduleConfig,
    read_run_config,
)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_json_round_trip(name: str) -> None:
    config = RECIPES[name]()
    text = json.dumps(config.to_dict())
    assert RunConfig.from_dict(json.loads(text)) == config


def test_every_field_survives_the_round_trip() -> None:
    base = demo_sambay()
    changed = dataclasses.replace(
        base,
        model=base.model.replace(window=77),
        data=DataConfig("elsewhere", 33, separate_documents=True, verify=False),
        optimizer=OptimizerConfig(1.5e-3, 2.0, 0.8, 0.9, 1e-6, 0.2, 0.5),
        schedule=ScheduleConfig(10**6, 10**5, base.schedule.kind, 0.2, 0.3),
        batch=BatchConfig(6, 3),
        regularisation=RegularisationConfig(0.1, 1e-4, 0.05, 3, None),
        evaluation=EvaluationConfig(7, None),
        checkpoint=CheckpointConfig(5, 9, 20, False),
        logging=LoggingConfig(3, True),
        parallel=ParallelConfig(2, 3, 4),
        resilience=ResilienceConfig(1, OnExceed.REWIND, 2, 1.5, 20, 60.0),
        compile=True,
        seed=9,
        activation_checkpointing=ActivationCheckpointing.SELECTIVE,
        threads=2,
    )
    for field in dataclasses.fields(RunConfig):
        if field.name not in ("precision", "init_scheme", "device"):
            assert getattr(changed, field.name) != getattr(base, field.name), field.name
    assert RunConfig.from_dict(json.loads(json.dumps(changed.to_dict()))) == changed


def _with(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps(values))
    *groups, name = path.split(".")
    inner = copy
    for group in groups:
        inner = inner[group]
    inner[name] = value
    return copy


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("optimizer.peak_learning_rate", -1.0, "optimizer.peak_learning_rate"),
        ("optimizer.peak_learning_rate", 0.0, "greater than 0"),
        ("optimizer.peak_learning_rate", "fast", "optimizer.peak_learning_rate"),
        ("optimizer.beta2", 1.0, "less than 1"),
        ("optimizer.clip_norm", 0.0, "optimizer.clip_norm"),
        ("optimizer.peak_learn_rate", 1.0, "did you mean 'peak_learning_rate'"),
        ("batch.micro_batch_size", 3, "a divisor of batch.global_batch_size (2)"),
        ("batch.global_batch_size", 0, "batch.global_batch_size"),
        ("batch.global_batch_size", True, "batch.global_batch_size"),
        ("schedule.warmup_tokens", 10**12, "at most schedule.total_tokens"),
        ("schedule.kind", "linaer", "did you mean 'linear'"),
        ("batch.global_batch_size", 4096, "schedule.total_tokens = 1200000 is less than one step"),
        ("schedule.minimum_factor", 1.5, "schedule.minimum_factor"),
        ("data.sequence_length", 0, "data.sequence_length"),
        ("data.directory", "", "data.directory"),
        ("data", 3, "data"),
        ("evaluation.max_tokens", 0, "evaluation.max_tokens"),
        ("checkpoint.keep", 0, "checkpoint.keep"),
        ("checkpoint.keep_every_steps", 300, "a multiple of checkpoint.every_steps (200)"),
        ("logging.tensorboard", "yes", "logging.tensorboard"),
        ("seed", -1, "seed"),
        ("threads", 0, "threads"),
        ("precision", "fp16", "precision"),
        ("modle", {}, "unknown field 'modle' (did you mean 'model'?)"),
        ("model.windwo", 5, "did you mean 'window'"),
        ("format_version", 99, "format_version = 99"),
    ],
)
def test_wrong_values_name_the_field(path: str, value: Any, message: str) -> None:
    values = _with(demo_sambay().to_dict(), path, value)
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict(values)
    assert message in str(caught.value)
    assert path.rpartition(".")[2] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_field_is_named_and_defaults_may_be_absent() -> None:
    values = demo_sambay().to_dict()
    del values["optimizer"]["weight_decay"]
    assert RunConfig.from_dict(values) == demo_sambay()
    del values["optimizer"]["peak_learning_rate"]
    with pytest.raises(ConfigError, match=r"'optimizer\.peak_learning_rate' is missing"):
        RunConfig.from_dict(values)


@pytest.mark.parametrize("content", [None, "{", "[1]", '{"a": 1}', "\xff"])
def test_unreadable_files_are_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_run_config(path)


def test_steps_are_whole_steps_within_the_budget() -> None:
    config = dataclasses.replace(demo_sambay(), schedule=ScheduleConfig(1024 * 3 + 1023))
    assert (config.tokens_per_step, config.num_steps) == (1024, 3)
