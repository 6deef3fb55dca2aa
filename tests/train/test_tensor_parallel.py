"""Several processes that compute one model together, against one process."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sambay.data.batches import Batch
from sambay.model import LanguageModel
from sambay.model.roles import halved_parameters
from sambay.train.config import (
    ParallelConfig,
    RunConfig,
)
from sambay.train.distributed import World, joined
from sambay.train.loss import IGNORE
from sambay.train.norms import role_norms
from sambay.train.parallel import fill
from sambay.train.pieces import pieces_of
from sambay.train.trainer import Trainer
from tests.tiny import tiny_config
from tests.train import test_distributed
from tests.train.conftest import SEQUENCE
from tests.train.processes import together
from tests.train.test_distributed import BATCH

MakeConfig = Callable[..., RunConfig]
NAMES = ["transformer++", "sambay", "sambay+da", "mambay", "sambay-a", "sambay-mlp"]
STEPS = 2
CLIP = 0.5  # below the first gradient norms, so that clipping is part of it

make = test_distributed.make


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """So that only mistakes make a difference, and not the order of sums."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def random_batch(config: RunConfig, step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(config.model.vocab_size, (BATCH, SEQUENCE + 1), generator=generator)
    labels = rows[:, 1:].clone()
    labels[0, 3], labels[1, :5] = IGNORE, IGNORE
    segments = (torch.arange(SEQUENCE) >= 6).int().expand(BATCH, -1).contiguous()
    return Batch(rows[:, :-1].contiguous(), labels, segments)


def random_weights(model: LanguageModel) -> dict[str, Callable[[], Tensor]]:
    """For every parameter a function that makes its value; nothing hides behind a zero or a one."""

    def make_value(seed: int, shape: torch.Size) -> Tensor:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return 0.5 + 0.2 * values if len(shape) == 1 else values / shape[1] ** 0.5

    return {
        name: functools.partial(make_value, number, parameter.shape)
        for number, (name, parameter) in enumerate(model.named_parameters())
    }


def learn(config: RunConfig, world: World | None = None) -> dict[str, Any]:
    """What a few steps from random weights tell on the way, and the weights they lead to."""
    trainer = Trainer(config, world)
    fill(trainer.model, random_weights(trainer.model))
    seen = []
    for step in range(STEPS):
        batch = random_batch(config, step)
        rows = trainer.world.rows(BATCH)
        assert batch.segments is not None
        mine = Batch(batch.input_ids[rows], batch.labels[rows], batch.segments[rows])
        learned = trainer.gradients(mine, step)
        norms = role_norms(trainer.model)
        trainer.update(1e-2, learned)
        evaluated = trainer.loss(random_batch(config, 99))
        seen.append([*learned, *map(float, norms.values()), float(evaluated)])
    halved = halved_parameters(trainer.model)
    weights = {
        name: [
            (part.place, part.values.clone())
            for part in pieces_of(parameter, in_halves=name in halved).parts
        ]
        for name, parameter in trainer.model.named_parameters()
    }
    return {"seen": seen, "weights": weights}


def check_equal(configs: list[RunConfig], count: int, folder: Path) -> None:
    """`count` processes learn what one learns, from the same weights to the same weights."""

    def action() -> list[dict[str, Any]]:
        with float64(), joined(configs[0]) as world:
            return [learn(config, world) for config in configs]

    answers = together(count, action, folder)
    for number, config in enumerate(configs):
        name = f"{config.model.layer_pattern} {config.model.attention_variant}"
        with float64():
            alone = learn(replace(config, parallel=ParallelConfig()))
        assert alone["seen"][0][2] > CLIP, "clipping is a part of it"
        assert abs(alone["seen"][0][0] - alone["seen"][-1][0]) > 0.01, "something was learned"
        for rank, answer in enumerate(answers):
            close = {"rtol": 1e-9, "atol": 1e-9}
            torch.testing.assert_close(
                torch.tensor(answer[number]["seen"]),
                torch.tensor(alone["seen"]),
                **close,
                msg=lambda text, who=f"{name}, process {rank}": f"{who}: {text}",
            )
        covered = 0
        for path, ((_, whole),) in alone["weights"].items():
            filled = torch.full_like(whole, float("nan"))
            for answer in answers:
                for place, values in answer[number]["weights"][path]:
                    filled[place] = values
            torch.testing.assert_close(filled, whole, rtol=1e-8, atol=1e-8, msg=f"{name} {path}")
            covered += whole.numel()
        for answer in answers:
            parts = [part for parts in answer[number]["weights"].values() for part in parts]
            mine = sum(values.numel() for _, values in parts)
            assert mine < 1.2 * covered / count, "each process holds its share"


@pytest.fixture
def exact(make: MakeConfig) -> MakeConfig:
    """Configurations whose model has every kind of parameter, for `check_equal`."""

    def exactly(name: str, tensor: int = 2, **fields: Any) -> RunConfig:
        model: dict[str, Any] = {"attention_bias": True, **fields.pop("model", {})}
        config = make(name, parallel=ParallelConfig(tensor=tensor), **fields)
        optimizer = replace(config.optimizer, clip_norm=CLIP)
        return replace(config, model=tiny_config(name, **model), optimizer=optimizer)

    return exactly


def test_two_processes_compute_each_model(exact: MakeConfig, tmp_path: Path) -> None:
    check_equal([exact(name) for name in NAMES], 2, tmp_path)
