"""The model in training: how it is made, what its loss is, and one step of learning."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from sambay.data.batches import Batch
from sambay.errors import SambayError
from sambay.layers.attention import set_attention_dropout
from sambay.layers.own_part import own_part
from sambay.train.config import Precision, RunConfig
from sambay.train.distributed import World, compute_device
from sambay.train.loss import IGNORE, Losses, cross_entropy
from sambay.train.noise import reproducible_noise
from sambay.train.optim import (
    build_optimizer,
    clip_gradients,
    first_nonfinite_gradient,
    gradient_norm,
    set_learning_rate,
)
from sambay.train.parallel import build_model, release
from sambay.train.tensor_parallel import vocabulary_shard
from sambay.train.watchdog import Watchdog


class NotFinite(SambayError):
    """The loss or a gradient is no longer a number; the weights were not touched."""


class Learned(NamedTuple):
    """What a step reports, in nats per token: the cross-entropy, and what was minimised.

    They are equal without label smoothing and z-loss. The gradient norm is that before clipping.
    """

    loss: float
    objective: float
    gradient_norm: float

    @property
    def is_finite(self) -> bool:
        """Whether weights may be updated by it."""
        return all(map(math.isfinite, self))


class Trainer:
    """A freshly initialised model and its optimiser, or this process's part of them.

    Weights and moments are float32. With bf16 the matrix products run in bfloat16 under autocast,
    while the residual stream, SSM parameters, softmax of the loss and sums stay float32.

    Batches are the rows of this process; what is reported is that of all of them.

    Raises:
        ConfigError: a device that is not there.
    """

    def __init__(
        self, config: RunConfig, world: World | None = None, watchdog: Watchdog | None = None
    ) -> None:
        self.config = config
        self.world = world or World(compute_device(config.device))
        self._watchdog = watchdog or Watchdog(self.world, config.resilience.hang_seconds)
        self.device = self.world.device
        self.model = build_model(config, self.world)
        self.optimizer = build_optimizer(self.model, config.optimizer)

    def learn(self, batch: Batch, rate: float, step: int) -> Learned:
        """Update the weights with the global batch that follows `step` steps; what came of it.

        Raises:
            NotFinite: loss or gradient norm is infinite or not a number; no weight was changed.
        """
        learned = self.gradients(batch, step)
        if not learned.is_finite:
            raise NotFinite(self.discard(learned))
        self.update(rate, learned)
        return learned

    def gradients(self, batch: Batch, step: int) -> Learned:
        """Compute the gradients of the global batch that follows `step` steps.

        Micro-batches are weighted by their tokens, so how the batch is split changes nothing but
        rounding, and with attention dropout its random numbers.
        """
        config, world = self.config, self.world
        self._watchdog.at("counting tokens", step)
        (num_tokens,) = world.sum(int((batch.labels != IGNORE).sum()))
        num_tokens = max(num_tokens, 1)  # rows of one token may be nothing but ends of documents
        first, second = config.regularisation.dropout_at(step)
        set_attention_dropout(self.model, self_decoder=first, cross_decoder=second)
        self.model.train()
        nats = objective = 0.0
        for index, part in enumerate(_split(batch, config.batch.micro_batch_size)):
            self._watchdog.at("forward and backward")
            place = (config.seed, step, world.rank, index)
            noisy = first > 0 or second > 0
            with reproducible_noise(self.device, *place) if noisy else nullcontext():
                losses = self._losses(part)
            (losses.objective / num_tokens).backward()
            nats += float(losses.nats)
            objective += float(losses.objective.detach())
        self._watchdog.at("summing gradients")
        nats, objective = world.sum(nats, objective)
        norm = gradient_norm(self.model.parameters())
        return Learned(nats / num_tokens, objective / num_tokens, float(norm))

    def update(self, rate: float, learned: Learned) -> None:
        """Clip the gradients that gave `learned`, and change the weights by them."""
        self._watchdog.at("updating weights")
        norm = torch.tensor(learned.gradient_norm, device=self.device)
        clip_gradients(self.model.parameters(), norm, self.config.optimizer.clip_norm)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def discard(self, learned: Learned) -> str:
        """Forget the gradients that gave `learned`; what was wrong with them, for people."""
        name = first_nonfinite_gradient(self.model, self.world)
        self.optimizer.zero_grad(set_to_none=True)
        where = f", first in the gradient of {name}" if name else ""
        return (
            f"the loss is {learned.loss:g} and the gradient norm {learned.gradient_norm:g}{where}"
        )

    def loss(self, batch: Batch) -> Tensor:
        """The summed cross-entropy of a batch, in nats, float32, as evaluated: without noise."""
        self._watchdog.at("evaluation")
        self.model.eval()
        if self.world.data_size == 1:
            nats = self._losses(batch).nats
        else:
            (total,) = self.world.sum(float(self._losses(self._share(batch)).nats))
            nats = torch.tensor(total, dtype=torch.float64)
        release(self.model)
        return nats

    def _share(self, batch: Batch) -> Batch:
        """This process's rows of a batch of any size; as many for each, since all work together."""
        count = batch.input_ids.shape[0]
        share = -(-count // self.world.data_size)
        rows = torch.arange(share) + self.world.data_rank * share
        rows, spare = rows.clamp(max=count - 1), rows >= count
        labels = batch.labels[rows].masked_fill(spare[:, None], IGNORE)
        segments = None if batch.segments is None else batch.segments[rows]
        return Batch(batch.input_ids[rows], labels, segments)

    def _losses(self, batch: Batch) -> Losses:
        settings = self.config.regularisation
        is_bf16 = self.config.precision is Precision.BF16
        segments = None if batch.segments is None else batch.segments.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=is_bf16):
            h_BTD = self.model.hidden_states(batch.input_ids.to(self.device), segments=segments)
        if is_bf16:
            h_BTD = h_BTD.bfloat16()
        return cross_entropy(
            h_BTD,
            own_part(self.model.head_weight),
            batch.labels.to(self.device),
            shard=vocabulary_shard(self.model, self.world),
            smoothing=settings.label_smoothing if self.model.training else 0.0,
            z_loss=settings.z_loss if self.model.training else 0.0,
        )


def _split(batch: Batch, size: int) -> Iterator[Batch]:
    for start in range(0, batch.input_ids.shape[0], size):
        rows = slice(start, start + size)
        segments = None if batch.segments is None else batch.segments[rows]
        yield Batch(batch.input_ids[rows], batch.labels[rows], segments)
