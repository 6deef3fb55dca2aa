"""The learning rate at hand-computed points."""

from __future__ import annotations

import dataclasses

import pytest

from sambay.recipes.demo import demo_sambay
from sambay.train.config import BatchConfig, OptimizerConfig, ScheduleConfig, ScheduleKind
from sambay.train.schedule import learning_rate, learning_rate_factor


def _schedule(kind: str, **fields: float) -> ScheduleConfig:
    return ScheduleConfig(1000, warmup_tokens=200, kind=ScheduleKind(kind), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "tokens", "expected"),
    [
        *((kind, 50, 0.25) for kind in ("linear", "constant", "cosine", "wsd")),
        *((kind, 200, 1.0) for kind in ("linear", "constant", "cosine", "wsd")),
        ("linear", 400, 0.75),
        ("linear", 1000, 0.0),
        ("linear", 1100, 0.0),
        ("constant", 999, 1.0),
        ("cosine", 600, 0.5),
        ("cosine", 400, 0.5 * (1 + 2**-0.5)),
        ("cosine", 1000, 0.0),
        ("wsd", 200 + 800 * 5 / 7, 1.0),  # constant for 5/7 of what follows the warm-up
        ("wsd", 200 + 800 * 6 / 7, 0.5),
        ("wsd", 1000, 0.0),
    ],
)
def test_factor_at_known_points(kind: str, tokens: float, expected: float) -> None:
    assert learning_rate_factor(_schedule(kind), tokens) == pytest.approx(expected, abs=1e-12)


def test_minimum_factor_is_the_end_and_scales_the_fall() -> None:
    schedule = _schedule("linear", minimum_factor=0.1)
    assert learning_rate_factor(schedule, 1000) == pytest.approx(0.1)
    assert learning_rate_factor(schedule, 600) == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate_factor(schedule, 100) == pytest.approx(0.5), "warm-up starts from 0"


def test_no_warmup_and_only_warmup() -> None:
    assert learning_rate_factor(ScheduleConfig(1000), 0) == 1.0
    only = ScheduleConfig(1000, warmup_tokens=1000)
    assert learning_rate_factor(only, 999) == pytest.approx(0.999)
    assert learning_rate_factor(only, 1000) == 0.0


def test_wsd_without_a_decay_stays_at_the_peak() -> None:
    assert learning_rate_factor(_schedule("wsd", decay_fraction=0.0), 1000) == 1.0


def test_rate_is_read_in_the_middle_of_a_step_and_does_not_depend_on_the_batch() -> None:
    config = dataclasses.replace(
        demo_sambay(),
        optimizer=OptimizerConfig(peak_learning_rate=2.0),
        schedule=ScheduleConfig(512 * 100, warmup_tokens=512 * 10),
        batch=BatchConfig(1, 1),
    )
    assert learning_rate(config, 0) == pytest.approx(2.0 * 0.05)
    assert learning_rate(config, 9) == pytest.approx(2.0 * 0.95)
    assert learning_rate(config, 99) == pytest.approx(2.0 * 0.5 / 90)
    twice = dataclasses.replace(config, batch=BatchConfig(2, 2))
    same_tokens = [learning_rate(config, 40), learning_rate(config, 41)]
    assert learning_rate(twice, 20) == pytest.approx(sum(same_tokens) / 2)
