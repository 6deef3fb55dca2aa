"""The sections of a run that decide what is learnt: data, optimiser, schedule, batch, objective."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from sambay.data.mixture import whole_weights
from sambay.errors import ConfigError
from sambay.train.config.checks import (
    check,
    check_greater,
    check_ints,
    check_not_negative,
    check_number,
    check_optional_ints,
    check_shares,
    check_shares_below_one,
)

DEFAULT_DECAY_FRACTION = 2 / 7


class ScheduleKind(StrEnum):
    """How the learning rate goes on after the warm-up."""

    LINEAR = "linear"
    CONSTANT = "constant"
    COSINE = "cosine"
    WSD = "wsd"


class Packing(StrEnum):
    """How documents become rows of the sequence length.

    windows: cut from the stream of documents wherever a row is full.
    best_fit: documents placed whole, only those longer than a row are cut.
    """

    WINDOWS = "windows"
    BEST_FIT = "best_fit"


@dataclass(frozen=True)
class MixtureSource:
    """One prepared set of a mixture; `weight` is its share of all rows."""

    directory: str
    weight: float

    def __post_init__(self) -> None:
        check(bool(self.directory), "data.mixture: directory", self.directory, "a folder")
        check_number(f"data.mixture: weight of {self.directory}", self.weight, 0.0, 1.0)


@dataclass(frozen=True)
class DataConfig:
    """Where the prepared tokens are and how they are cut into training sequences.

    Exactly one of `directory` and `mixture` (several sets by weight) is given.
    `separate_documents` keeps attention, convolution and scan from crossing a document's end, and
    leaves the first token of each document out of the loss.
    `verify` compares the checksum of every shard before the run starts.
    """

    directory: str = ""
    sequence_length: int = 512
    separate_documents: bool = False
    verify: bool = True
    mixture: tuple[MixtureSource, ...] = ()
    packing: Packing = Packing.WINDOWS

    def __post_init__(self) -> None:
        check_ints("data", self, sequence_length=1)
        if bool(self.directory) == bool(self.mixture):
            raise ConfigError(
                f"data.directory = {self.directory!r} and data.mixture has {len(self.mixture)} "
                "sets; give exactly one of the two"
            )
        if self.mixture:
            folders = [os.path.normpath(source.directory) for source in self.mixture]
            for folder in folders:
                if folders.count(folder) > 1:
                    raise ConfigError(
                        f"data.mixture names {folder} twice; add its weights up in one entry"
                    )
            whole_weights([source.weight for source in self.mixture])
        if self.packing is Packing.BEST_FIT and not self.separate_documents:
            raise ConfigError(
                "data.packing = 'best_fit' keeps documents apart; set data.separate_documents=true"
            )

    def replace(self, **fields: Any) -> DataConfig:
        """A copy with other values; a directory takes the place of a mixture and the reverse."""
        if "directory" in fields:
            fields = {"mixture": (), **fields}
        elif "mixture" in fields:
            fields = {"directory": "", **fields}
        return dataclasses.replace(self, **fields)

    @property
    def sources(self) -> tuple[MixtureSource, ...]:
        """The sets with their weights; a single directory is a mixture of one."""
        return self.mixture or (MixtureSource(self.directory, 1.0),)

    @property
    def source_names(self) -> tuple[str, ...]:
        """A short name for each of `sources`: its folder's, unless another has the same."""
        paths = [Path(os.path.normpath(source.directory)) for source in self.sources]
        names = [path.name or str(path) for path in paths]
        return tuple(
            str(path) if names.count(name) > 1 else name
            for path, name in zip(paths, names, strict=True)
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. `weight_decay` applies to matrix-like parameters only.

    `matrix_learning_rate_factor` multiplies the rate of matrix-like parameters (muP: d0/d).
    `vector_weight_decay` applies to all others; models in standard parametrisation decay them too.
    """

    peak_learning_rate: float
    matrix_learning_rate_factor: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    vector_weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_greater("optimizer", self, 0.0, "peak_learning_rate", "clip_norm")
        check_not_negative("optimizer", self, "matrix_learning_rate_factor", "eps")
        check_not_negative("optimizer", self, "weight_decay", "vector_weight_decay")
        check_shares_below_one("optimizer", self, "beta1", "beta2")


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate as a function of tokens seen; `total_tokens` is also the run's length."""

    total_tokens: int
    warmup_tokens: int = 0
    kind: ScheduleKind = ScheduleKind.LINEAR
    minimum_factor: float = 0.0
    decay_fraction: float = DEFAULT_DECAY_FRACTION  # of what follows the warm-up; for wsd

    def __post_init__(self) -> None:
        check_ints("schedule", self, total_tokens=1, warmup_tokens=0)
        below_total = f"at most schedule.total_tokens ({self.total_tokens})"
        correct = self.warmup_tokens <= self.total_tokens
        check(correct, "schedule.warmup_tokens", self.warmup_tokens, below_total)
        check_shares("schedule", self, "minimum_factor", "decay_fraction")


@dataclass(frozen=True)
class BatchConfig:
    """Sizes in sequences: what one optimiser step sees, and what one forward pass sees."""

    global_batch_size: int
    micro_batch_size: int

    def __post_init__(self) -> None:
        check_ints("batch", self, global_batch_size=1, micro_batch_size=1)
        divides = self.global_batch_size % self.micro_batch_size == 0
        must = f"a divisor of batch.global_batch_size ({self.global_batch_size})"
        check(divides, "batch.micro_batch_size", self.micro_batch_size, must)


@dataclass(frozen=True)
class RegularisationConfig:
    """What training minimises besides the plain cross-entropy, and noise; evaluation has neither.

    `label_smoothing` moves this share of every target evenly onto the whole vocabulary; `z_loss`
    is the coefficient of the squared log-sum-exp of the logits. `attention_dropout` drops this
    share of the attention probabilities of the self-decoder (layers with keys of their own) and
    of the cross-decoder (layers that read another's), each from its step on; None: never.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    attention_dropout: float = 0.0
    self_decoder_from_step: int | None = 0
    cross_decoder_from_step: int | None = 0

    def __post_init__(self) -> None:
        check_shares_below_one("regularisation", self, "label_smoothing", "attention_dropout")
        check_not_negative("regularisation", self, "z_loss")
        starts = {"self_decoder_from_step": 0, "cross_decoder_from_step": 0}
        check_optional_ints("regularisation", self, **starts)

    @property
    def changes_objective(self) -> bool:
        """Whether what is minimised differs from the cross-entropy."""
        return self.label_smoothing > 0 or self.z_loss > 0

    def dropout_at(self, step: int) -> tuple[float, float]:
        """The dropout of self-decoder and cross-decoder in the step after `step` steps."""
        starts = (self.self_decoder_from_step, self.cross_decoder_from_step)
        first, second = (
            self.attention_dropout if start is not None and step >= start else 0.0
            for start in starts
        )
        return first, second
