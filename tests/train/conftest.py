"""A tiny prepared set and run configurations small enough to train in a blink."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sambay.data.manifest import Manifest
from sambay.data.prepare import prepare
from sambay.data.settings import PrepareSettings
from sambay.train.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
)
from tests.tiny import tiny_config

SEQUENCE = 13
GLOBAL_BATCH = 6


def make_data(folder: Path, seed: int = 0) -> Path:
    """A prepared set of a few thousand tokens of random words."""
    source = folder / "texts"
    source.mkdir(parents=True)
    generator = random.Random(seed)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    for number in range(40):
        text = " ".join(generator.choice(words) for _ in range(60))
        (source / f"{number}.txt").write_text(text)
    prepare(
        [source],
        folder / "data",
        PrepareSettings(vocab_size=300, validation_fraction=0.2),
        workers=1,
    )
    return folder / "data"


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def make_config(data: Path) -> Callable[..., RunConfig]:
    """A run of a tiny model; `steps` long, any other field replaced.

    Without the repeated layers of the self-decoder: what is tested is the training around them.
    """

    def make(name: str = "sambay", steps: int = 6, **fields: Any) -> RunConfig:
        vocab_size = Manifest.read(data).vocab_size
        tokens = GLOBAL_BATCH * SEQUENCE
        whole = tiny_config(name, vocab_size=vocab_size)
        config = RunConfig(
            model=replace(whole, layer_pattern=whole.layer_pattern.replace("2x(M S) M", "S M")),
            data=DataConfig(str(data), sequence_length=SEQUENCE),
            optimizer=OptimizerConfig(peak_learning_rate=3e-3),
            schedule=ScheduleConfig(steps * tokens, warmup_tokens=min(2, steps) * tokens),
            batch=BatchConfig(GLOBAL_BATCH, GLOBAL_BATCH),
            evaluation=EvaluationConfig(every_steps=4, max_tokens=SEQUENCE * 9),
            checkpoint=CheckpointConfig(every_steps=2),
            seed=5,
            threads=1,  # tensors this small lose more by waiting for each other than they gain
        )
        return replace(config, **fields)

    return make
