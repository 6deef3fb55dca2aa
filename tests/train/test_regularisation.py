"""Smoothing, z-loss and attention dropout in a run: when they act, and that nothing is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sambay.data.batches import read_batch
from sambay.data.shards import TokenDataset
from sambay.errors import CheckpointMismatch, ConfigError
from sambay.train.config import (
    ActivationCheckpointing,
    BatchConfig,
    RegularisationConfig,
    RunConfig,
)
from sambay.train.loop import train
from sambay.train.metrics import read_metrics
from sambay.train.noise import reproducible_noise
from sambay.train.plan import without_effect
from sambay.train.trainer import Trainer
from tests.train.conftest import GLOBAL_BATCH, SEQUENCE
from tests.train.test_resume import StopAt, assert_same_run, final_tensors, lines

MakeConfig = Callable[..., RunConfig]
SWITCHED = RegularisationConfig(0.1, 1e-3, 0.2, self_decoder_from_step=2, cross_decoder_from_step=4)


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run_dir)]


def some_batch(config: RunConfig) -> Any:
    dataset = TokenDataset.open(config.data.directory, "train")
    return read_batch(dataset, range(GLOBAL_BATCH), SEQUENCE)


@pytest.mark.parametrize("name", [pytest.param("sambay", marks=pytest.mark.slow), "sambay+da"])
def test_resumed_equals_uninterrupted(name: str, make_config: MakeConfig, tmp_path: Path) -> None:
    """Cut before and at the steps at which dropout is switched on, and between them."""
    config = make_config(name, regularisation=SWITCHED, batch=BatchConfig(GLOBAL_BATCH, 2))
    train(config, tmp_path / "whole")
    for stop_step in (1, 2, 4):
        train(config, tmp_path / "cut", display=StopAt(stop_step))
        torch.manual_seed(stop_step)  # what else draws random numbers must not matter
    train(config, tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_dropout_begins_at_its_step(make_config: MakeConfig, tmp_path: Path) -> None:
    train(make_config(), tmp_path / "plain")
    plain = losses(tmp_path / "plain")
    for starts, first_other in (((2, None), 3), ((None, 4), 5), ((0, None), 1), ((3, 3), 4)):
        config = make_config(regularisation=RegularisationConfig(0.0, 0.0, 0.2, *starts))
        run_dir = tmp_path / f"dropped from {first_other}"
        train(config, run_dir)
        same = [a == b for a, b in zip(plain, losses(run_dir), strict=True)]
        assert same == [step < first_other for step in range(1, 7)], starts


def test_recomputation_drops_the_same(make_config: MakeConfig, tmp_path: Path) -> None:
    noisy = RegularisationConfig(attention_dropout=0.3)
    runs = []
    for kind in ActivationCheckpointing:
        config = make_config(steps=3, regularisation=noisy, activation_checkpointing=kind)
        train(config, tmp_path / kind.value)
        runs.append(final_tensors(tmp_path / kind.value))
    for name in runs[0]:
        for other in runs[1:]:
            torch.testing.assert_close(runs[0][name], other[name], rtol=1e-4, atol=1e-5)


def test_what_is_reported(make_config: MakeConfig, tmp_path: Path) -> None:
    """The cross-entropy stays comparable; what is minimised stands beside it."""
    smooth = RegularisationConfig(label_smoothing=0.1, z_loss=1e-2)
    train(make_config(steps=2), tmp_path / "plain")
    train(make_config(steps=2, regularisation=smooth), tmp_path / "smooth")
    plain, other = (read_metrics(tmp_path / name) for name in ("plain", "smooth"))
    assert other[0]["loss"] == plain[0]["loss"]  # the same weights, before the first update
    assert other[0]["objective"] > other[0]["loss"] + 1e-2
    assert other[0]["gradient_norm"] != plain[0]["gradient_norm"]
    assert other[1]["loss"] != plain[1]["loss"]
    assert all("objective" not in line for line in plain)


def test_evaluation_is_free_of_all_of_it(make_config: MakeConfig) -> None:
    config = make_config()
    plain = Trainer(config)
    noisy = Trainer(make_config(regularisation=RegularisationConfig(0.1, 0.1, 0.5)))
    batch = some_batch(config)
    noisy.learn(batch, 0.0, 0)  # a rate of 0: the weights stay, dropout is switched on
    before = torch.get_rng_state()
    with torch.no_grad():
        assert torch.equal(noisy.loss(batch), plain.loss(batch))
    assert torch.equal(before, torch.get_rng_state())
    assert noisy.learn(batch, 0.0, 0).loss != plain.learn(batch, 0.0, 0).loss


def test_every_step_and_micro_batch_has_its_own_noise(make_config: MakeConfig) -> None:
    regularisation = RegularisationConfig(attention_dropout=0.3)
    trainer = Trainer(make_config(regularisation=regularisation))
    batch = some_batch(trainer.config)
    assert trainer.learn(batch, 0.0, 3).loss == trainer.learn(batch, 0.0, 3).loss
    assert trainer.learn(batch, 0.0, 3).loss != trainer.learn(batch, 0.0, 4).loss
    device = torch.device("cpu")
    drawn = set()
    for place in [(5, 3, 0, 0), (5, 3, 0, 1), (5, 3, 1, 0), (5, 4, 0, 0), (6, 3, 0, 0), (53, 0, 0)]:
        before = torch.get_rng_state()
        with reproducible_noise(device, *place):
            first = torch.rand(()).item()
        assert torch.equal(before, torch.get_rng_state())
        torch.rand(7)
        with reproducible_noise(device, *place):
            assert torch.rand(()).item() == first
        drawn.add(first)
    assert len(drawn) == 6


def test_a_diverging_run_may_go_on_with_dropout(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(steps=4)
    train(config, tmp_path, display=StopAt(2))
    later = make_config(steps=4, regularisation=RegularisationConfig(0.1, 0.0, 0.05, 2, 3))
    with pytest.raises(CheckpointMismatch, match=r"regularisation\.\w+ = .*--change-schedule"):
        train(later, tmp_path)
    train(later, tmp_path, change_schedule=True)
    assert ["objective" in line for line in read_metrics(tmp_path)] == [False, False, True, True]
    assert lines(tmp_path)[-1]["step"] == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("label_smoothing", 1.0),
        ("label_smoothing", -0.1),
        ("attention_dropout", 1.0),
        ("attention_dropout", float("nan")),
        ("z_loss", -1e-4),
        ("z_loss", float("inf")),
        ("self_decoder_from_step", -1),
        ("cross_decoder_from_step", 0.5),
    ],
)
def test_values_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^regularisation\.{field} = "):
        RegularisationConfig(**{field: value})


@pytest.mark.parametrize(
    ("name", "dropout", "starts", "expected"),
    [
        ("sambay", 0.05, (2, 3), []),
        ("sambay", 0.05, (0, None), []),
        ("sambay", 0.0, (0, 0), []),
        ("sambay", 0.0, (2, 0), ["self_decoder_from_step has no effect"]),
        ("sambay", 0.05, (5, 6), ["cross_decoder_from_step = 6 is never reached"]),
        ("transformer++", 0.05, (2, 3), ["cross_decoder_from_step has no effect on a model"]),
    ],
)
def test_starts_without_effect_are_pointed_out(
    name: str,
    dropout: float,
    starts: tuple[int, int | None],
    expected: list[str],
    make_config: MakeConfig,
) -> None:
    config = make_config(name, regularisation=RegularisationConfig(0.0, 0.0, dropout, *starts))
    found = without_effect(config)
    assert len(found) == len(expected)
    for line, part in zip(found, expected, strict=True):
        assert line.startswith(f"regularisation.{part}")


def test_a_configuration_survives_json(make_config: MakeConfig) -> None:
    config = make_config(regularisation=RegularisationConfig(0.1, 1e-4, 0.05, 310_000, None))
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.regularisation.dropout_at(309_999) == (0.0, 0.0)
    assert config.regularisation.dropout_at(310_000) == (0.05, 0.0)
    assert SWITCHED.dropout_at(4) == (0.2, 0.2)
