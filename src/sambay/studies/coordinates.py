"""The coordinate check: how activations and updates change with width, depth, or both.

A parametrisation carries hyperparameters over to other sizes only if a few steps of training move
what a model computes by amounts that do not depend on its size (arXiv 2203.03466, appendix D.1).
Each point of a sweep is a model that takes a few steps on one fixed batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sambay.data.batches import Batch
from sambay.errors import ConfigError, nearest
from sambay.layers.roles import Role
from sambay.scaling.rules import RULES
from sambay.spec import AttentionVariant, InitScheme, Parametrization, RecurrentKind, presets
from sambay.studies.probes import (
    ATTENTION_LOGITS,
    LARGEST_ATTENTION_LOGIT,
    Captured,
    activations,
    updates,
)
from sambay.train.config import (
    BatchConfig,
    DataConfig,
    Device,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    ScheduleKind,
)
from sambay.train.trainer import NotFinite, Trainer


class Sweep(enum.StrEnum):
    """What grows from point to point."""

    WIDTH = "width"
    DEPTH = "depth"
    LADDER = "ladder"  # both, width in proportion to depth


class Measure(enum.StrEnum):
    """What of a quantity is measured, as the mean of absolute values."""

    LEVEL = "level"  # the activation itself
    CHANGE = "change"  # its difference from before training
    UPDATE = "update"  # what the learned part of one weight adds to its output


@dataclasses.dataclass(frozen=True, order=True)
class Point:
    """The size of one model."""

    width: int
    depth: int


@dataclasses.dataclass(frozen=True)
class CheckSettings:
    """What all points have in common.

    learning_rate: of vector-like parameters at the first point of a sweep, which is also the size
        to which the multipliers of width and depth are relative.
    """

    architecture: str = "sambay"
    head_dim: int = 16
    vocab_size: int = 512
    sequence_length: int = 64
    batch_size: int = 4
    steps: int = 10
    learning_rate: float = 2e-3
    seeds: tuple[int, ...] = (0,)
    init_scheme: InitScheme = InitScheme.MUP_PUBLISHED
    device: Device = Device.CPU
    threads: int | None = None


@dataclasses.dataclass(frozen=True)
class Reading:
    """One measured value: the mean over the layers that have the quantity; NaN after divergence."""

    parametrization: Parametrization
    width: int
    depth: int
    seed: int
    step: int
    measure: Measure
    quantity: str
    value: float


def run_config(
    settings: CheckSettings, point: Point, base: Point, parametrization: Parametrization, seed: int
) -> RunConfig:
    """The training run of a point, with its rates and multipliers relative to `base`.

    Published runs grow width with depth and use d0/d for both. Here the two are kept apart: what
    muP scales with width goes by the ratio of widths, what muP++ adds for depth by that of depths.

    Raises:
        ConfigError: a width that is no multiple of what the heads need, or an impossible depth.
    """
    rules = RULES[parametrization]
    is_standard = parametrization is Parametrization.STANDARD
    narrower, shallower = base.width / point.width, base.depth / point.depth
    fields = _shape(settings, point)
    if not is_standard:
        fields["logit_multiplier"] = narrower
    return RunConfig(
        model=presets.build(
            settings.architecture, point.depth, parametrization=parametrization, **fields
        ),
        data=DataConfig("(one fixed batch)", sequence_length=settings.sequence_length),
        optimizer=OptimizerConfig(
            peak_learning_rate=settings.learning_rate * shallower**rules.peak_power,
            matrix_learning_rate_factor=narrower ** rules.roles[Role.MATRIX].rate_power,
            weight_decay=rules.weight_decay(Role.MATRIX),
            vector_weight_decay=rules.weight_decay(Role.VECTOR),
        ),
        schedule=ScheduleConfig(
            settings.steps * settings.batch_size * settings.sequence_length,
            kind=ScheduleKind.CONSTANT,
        ),
        batch=BatchConfig(settings.batch_size, settings.batch_size),
        init_scheme=rules.init_scheme if is_standard else settings.init_scheme,
        seed=seed,
        device=settings.device,
        threads=settings.threads,
    )


def _shape(settings: CheckSettings, point: Point) -> dict[str, Any]:
    """Fields of the model: as many heads as fill the width, two of them to each key head."""
    name, head_dim = settings.architecture, settings.head_dim
    if name not in presets.NAMES:
        raise ConfigError(f"architecture '{name}' does not exist{nearest(name, presets.NAMES)}")
    fixed = presets.PRESETS[name].fields
    differential = fixed.get("attention_variant") == AttentionVariant.DIFFERENTIAL
    unit = max(32, head_dim * (4 if differential else 2))
    if point.width < unit or point.width % unit:
        raise ConfigError(
            f"width = {point.width}; '{name}' with heads of {head_dim} needs a multiple of {unit}, "
            "so that all its parts grow with the width alike"
        )
    fields: dict[str, Any] = {
        "vocab_size": settings.vocab_size,
        "hidden_size": point.width,
        "head_dim": head_dim,
        "num_heads": point.width // head_dim,
        "num_kv_heads": point.width // head_dim // 2,
    }
    if "window" in fixed:
        fields["window"] = max(1, settings.sequence_length // 2)
    # Heads small enough to be many: their number is what grows.
    small_heads = {
        RecurrentKind.MAMBA: {},
        RecurrentKind.MAMBA2: {"recurrent_head_dim": 8, "d_state": 16},
        RecurrentKind.GATED_DELTA: {"recurrent_head_dim": 16, "d_state": 8},
    }
    return fields | small_heads[fixed.get("recurrent_kind", RecurrentKind.MAMBA)]


def random_batch(settings: CheckSettings, seed: int = 0) -> Batch:
    """A batch of uniformly random tokens: nothing to learn but to remember it."""
    generator = torch.Generator().manual_seed(seed)
    shape = (settings.batch_size, settings.sequence_length + 1)
    ids_BT = torch.randint(settings.vocab_size, shape, generator=generator)
    return Batch(ids_BT[:, :-1], ids_BT[:, 1:], None)


def check(
    settings: CheckSettings,
    points: Sequence[Point],
    parametrizations: Sequence[Parametrization],
    batch: Batch,
    *,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Reading]:
    """The readings of all points, seeds and parametrisations, relative to the first point.

    `tell` gets a line for each model that was trained.

    Raises:
        ConfigError: fewer than two points, or one that cannot be built (before any training).
    """
    if len(set(points)) < 2:
        raise ConfigError("a sweep needs at least two different sizes to compare")
    planned = [
        (parametrization, point, run_config(settings, point, points[0], parametrization, seed))
        for parametrization in parametrizations
        for point in points
        for seed in settings.seeds
    ]
    readings: list[Reading] = []
    for number, (parametrization, point, config) in enumerate(planned, start=1):
        place = (parametrization, point.width, point.depth, config.seed)
        for step, measure, values in _measured(config, batch):
            readings += [Reading(*place, step, measure, *entry) for entry in values.items()]
        tell(
            f"[{number}/{len(planned)}] {parametrization}, width {point.width}, "
            f"depth {point.depth}, seed {config.seed}"
        )
    return readings


Measured = tuple[int, Measure, dict[str, float]]


def _measured(config: RunConfig, batch: Batch) -> Iterator[Measured]:
    """Levels before and after training; changes and updates after the first and the last step."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    trainer = Trainer(config)
    model, ids_BT = trainer.model, batch.input_ids.to(trainer.device)
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    before = activations(model, ids_BT)
    yield 0, Measure.LEVEL, _means(before)
    for step in range(1, config.num_steps + 1):
        with contextlib.suppress(NotFinite):  # the weights stay, and what they give shows it
            trainer.learn(batch, config.optimizer.peak_learning_rate, step - 1)
        if step in (1, config.num_steps):
            now = activations(model, ids_BT)
            yield step, Measure.LEVEL, _means(now)
            yield step, Measure.CHANGE, _means(_differences(now, before))
            yield step, Measure.UPDATE, _means(updates(model, weights, ids_BT))


def _differences(now: Captured, before: Captured) -> Captured:
    return {
        quantity: [a - b for a, b in zip(tensors, before[quantity], strict=True)]
        for quantity, tensors in now.items()
    }


def _means(found: Captured) -> dict[str, float]:
    """The mean absolute value by quantity, and of attention logits also the largest."""
    means = {quantity: _over_layers(tensors, Tensor.mean) for quantity, tensors in found.items()}
    if ATTENTION_LOGITS in found:
        means[LARGEST_ATTENTION_LOGIT] = _over_layers(found[ATTENTION_LOGITS], Tensor.max)
    return means


def _over_layers(tensors: list[Tensor], reduce: Callable[[Tensor], Tensor]) -> float:
    return sum(float(reduce(tensor.float().abs())) for tensor in tensors) / len(tensors)
