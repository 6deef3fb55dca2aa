"""The model in training: how it is made, what its loss is, and one step of learning."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sambay.data.batches import Batch
from sambay.errors import ConfigError, SambayError
from sambay.layers.attention import set_attention_dropout
from sambay.model import LanguageModel, initialise
from sambay.model.folder import materialise
from sambay.train.config import Device, Precision, RunConfig
from sambay.train.loss import IGNORE, Losses, cross_entropy
from sambay.train.noise import reproducible_noise
from sambay.train.optim import (
    build_optimizer,
    clip_gradients,
    first_nonfinite_gradient,
    set_learning_rate,
)


class NotFinite(SambayError):
    """The loss or a gradient is no longer a number; the weights were not touched."""


class Learned(NamedTuple):
    """What a step reports, in nats per token: the cross-entropy, and what was minimised.

    They are equal without label smoothing and z-loss. The gradient norm is that before clipping.
    """

    loss: float
    objective: float
    gradient_norm: float


class Trainer:
    """A freshly initialised model and its optimiser.

    Weights and moments are float32. With bf16 the matrix products run in bfloat16 under autocast,
    while the residual stream, SSM parameters, softmax of the loss and sums stay float32.

    Raises:
        ConfigError: a device that is not there.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.device = _device(config.device)
        with torch.device("meta"):
            self.model = LanguageModel(config.model)
        empty = {id(tensor): torch.empty(tensor.shape) for tensor in self.model.parameters()}
        materialise(self.model, empty)
        initialise(self.model, scheme=config.init_scheme.value, seed=config.seed)
        self.model.activation_checkpointing = config.activation_checkpointing
        self.model.to(self.device)
        self.optimizer = build_optimizer(self.model, config.optimizer)

    def learn(self, batch: Batch, rate: float, step: int) -> Learned:
        """Update the weights with the global batch that follows `step` steps; what came of it.

        Micro-batches are weighted by their tokens, so how the batch is split changes nothing but
        rounding, and with attention dropout its random numbers.

        Raises:
            NotFinite: loss or gradient norm is infinite or not a number.
        """
        config = self.config
        num_tokens = int((batch.labels != IGNORE).sum())
        first, second = config.regularisation.dropout_at(step)
        set_attention_dropout(self.model, self_decoder=first, cross_decoder=second)
        self.model.train()
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        nats = objective = 0.0
        for index, part in enumerate(_split(batch, config.batch.micro_batch_size)):
            place = (config.seed, step, rank, index)
            noisy = first > 0 or second > 0
            with reproducible_noise(self.device, *place) if noisy else nullcontext():
                losses = self._losses(part)
            (losses.objective / num_tokens).backward()
            nats += float(losses.nats)
            objective += float(losses.objective.detach())
        loss = nats / num_tokens
        norm = clip_gradients(self.model.parameters(), config.optimizer.clip_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            name = first_nonfinite_gradient(self.model)
            where = f", first in the gradient of {name}" if name else ""
            raise NotFinite(f"the loss is {loss:g} and the gradient norm {norm:g}{where}")
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Learned(loss, objective / num_tokens, norm)

    def loss(self, batch: Batch) -> Tensor:
        """The summed cross-entropy of a batch, in nats, float32, as evaluated: without noise."""
        self.model.eval()
        return self._losses(batch).nats

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
            self.model.head_weight,
            batch.labels.to(self.device),
            smoothing=settings.label_smoothing if self.model.training else 0.0,
            z_loss=settings.z_loss if self.model.training else 0.0,
        )


def _split(batch: Batch, size: int) -> Iterator[Batch]:
    for start in range(0, batch.input_ids.shape[0], size):
        rows = slice(start, start + size)
        segments = None if batch.segments is None else batch.segments[rows]
        yield Batch(batch.input_ids[rows], batch.labels[rows], segments)


def _device(device: Device) -> torch.device:
    if device is Device.AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device is Device.CUDA and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda', but torch sees no CUDA device; use device=auto")
    return torch.device(device.value)
