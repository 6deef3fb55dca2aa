"""Overrides: every type, and mistakes that are explained."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from sambay.cli.overrides import apply_overrides
from sambay.errors import ConfigError
from sambay.recipes.demo import demo_sambay
from sambay.train.config import Precision, ScheduleKind


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimizer.peak_learning_rate=3e-4", 3e-4),
        ("optimizer.clip_norm=2", 2.0),
        ("schedule.total_tokens=1e6", 1_000_000),
        ("schedule.total_tokens=4_096_000", 4_096_000),
        ("data.directory=a=b c", "a=b c"),
        ("schedule.kind=wsd", ScheduleKind.WSD),
        ("precision=bf16", Precision.BF16),
        ("evaluation.max_tokens=none", None),
        ("evaluation.max_tokens=5", 5),
        ("logging.tensorboard=yes", True),
        ("activation_checkpointing=selective", "selective"),
        ("threads=2", 2),
        ("model.window=64", 64),
        ("model.tie_embeddings=false", False),
        ("model.norm=layer", "layer"),
        (" seed = 7 ", 7),
    ],
)
def test_values_are_typed_by_their_field(text: str, expected: Any) -> None:
    config: Any = apply_overrides(demo_sambay(), [text])
    for name in text.partition("=")[0].strip().split("."):
        config = getattr(config, name)
    assert config == expected
    assert type(config) is type(expected) or isinstance(config, str)


def test_overrides_apply_together_whatever_their_order() -> None:
    both = ["batch.micro_batch_size=6", "batch.global_batch_size=12"]
    config = apply_overrides(demo_sambay(), both)
    assert config == apply_overrides(demo_sambay(), both[::-1])
    assert (config.batch.global_batch_size, config.batch.micro_batch_size) == (12, 6)


def test_nothing_changes_nothing() -> None:
    assert apply_overrides(demo_sambay(), []) == demo_sambay()


def test_a_model_recomputes_what_follows() -> None:
    config = apply_overrides(demo_sambay(), ["model.hidden_size=320"])
    assert config.model.dt_rank == 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer.peak_learning_rat=1", "did you mean 'optimizer.peak_learning_rate'"),
        ("optimiser.eps=1", "unknown field 'optimiser.eps' (did you mean 'optimizer.eps'?)"),
        ("sead=1", "did you mean 'seed'"),
        ("model.windw=1", "did you mean 'model.window'"),
        ("seed", "'seed' is not an override"),
        ("optimizer=3", "'optimizer' is a group of fields"),
        ("seed=1.5", "seed = '1.5'; it must be a whole number"),
        ("seed=inf", "a whole number"),
        ("seed=", "a whole number"),
        ("threads=many", "a whole number or None"),
        ("optimizer.eps=small", "optimizer.eps = 'small'; it must be a number"),
        ("optimizer.eps=nan", "it must be a number"),
        ("logging.tensorboard=2", "true or false"),
        ("precision=fp8", "precision = 'fp8'"),
        ("schedule.kind=cosin", "did you mean 'cosine'"),
        ("batch.micro_batch_size=3", "a divisor of"),
        ("model.window=0", "model.window"),
        ("model.layer_pattern=3xQ", "layer_pattern"),
        ("model.layers=3", "unknown field 'model.layers'"),
    ],
)
def test_mistakes_are_explained_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(demo_sambay(), [text])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_field_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="seed is given twice"):
        apply_overrides(demo_sambay(), ["seed=1", "seed=2"])


def test_every_field_can_be_overridden_with_its_own_value() -> None:
    config = demo_sambay()
    texts = []
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        if dataclasses.is_dataclass(value):
            inner = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            # Python writes tuples as JSON does not.
            lists = {name: list(one) for name, one in inner.items() if isinstance(one, tuple)}
            texts += [f"{section.name}.{name}={one}" for name, one in (inner | lists).items()]
        else:
            texts.append(f"{section.name}={value}")
    assert len(texts) > 40
    assert apply_overrides(config, texts) == config
