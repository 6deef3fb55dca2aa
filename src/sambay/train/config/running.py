"""The sections of a run that decide how it goes on: measuring, saving, processes, accidents."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

from sambay.train.config.checks import (
    check,
    check_greater,
    check_int,
    check_ints,
    check_number,
    check_optional_ints,
)


class Precision(StrEnum):
    """The number format of the forward and backward pass; weights and optimiser are always fp32."""

    FP32 = "fp32"
    BF16 = "bf16"


class Device(StrEnum):
    """Where to compute; "auto" takes CUDA if torch sees it."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class ActivationCheckpointing(StrEnum):
    """What the backward pass computes again instead of keeping it.

    none: nothing. full: all of a block but its input. selective: all but the results of matrix
    products and scans, which cost the most; the rest is element-wise work and attention.
    """

    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"


class OnExceed(StrEnum):
    """What happens after too many steps in a row that could not be used."""

    STOP = "stop"
    REWIND = "rewind"


class Sink(StrEnum):
    """A tool that shows a run's numbers while it goes on."""

    TENSORBOARD = "tensorboard"
    TRACKIO = "trackio"
    WANDB = "wandb"


@dataclass(frozen=True)
class EvaluationConfig:
    """When to measure, on which validation splits, in which lengths and on how many tokens.

    sets: prepared sets by name, of which the validation split is read; none: those of the training
        data.
    lengths: multiples of data.sequence_length.
    max_tokens: of each set in each length; None: all of them.
    """

    every_steps: int = 250
    max_tokens: int | None = None
    sets: dict[str, str] = field(default_factory=dict)
    lengths: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        check_ints("evaluation", self, every_steps=1)
        check_optional_ints("evaluation", self, max_tokens=1)
        for name, folder in self.sets.items():
            check(bool(name) and "/" not in name, "evaluation.sets", name, "names without '/'")
            check(bool(folder), f"evaluation.sets.{name}", folder, "a folder")
        check(bool(self.lengths), "evaluation.lengths", self.lengths, "at least one multiple")
        for multiple in self.lengths:
            check_int("evaluation.lengths", multiple, 1)
        rising = all(a < b for a, b in pairwise(self.lengths))
        check(rising, "evaluation.lengths", self.lengths, "ascending, each once")


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save; the last `keep` stay, and so does every `keep_every_steps`-th if given.

    `asynchronous` copies the state in memory and writes the copy while training goes on.
    """

    every_steps: int = 250
    keep: int = 2
    keep_every_steps: int | None = None
    asynchronous: bool = True

    def __post_init__(self) -> None:
        check_ints("checkpoint", self, every_steps=1, keep=1)
        check_optional_ints("checkpoint", self, keep_every_steps=1)
        if self.keep_every_steps is not None:
            must = f"a multiple of checkpoint.every_steps ({self.every_steps})"
            divides = self.keep_every_steps % self.every_steps == 0
            check(divides, "checkpoint.keep_every_steps", self.keep_every_steps, must)


@dataclass(frozen=True)
class ParallelConfig:
    """How processes share the work; the product of the three sizes is their number.

    replicate: copies of the model, each on its own processes; only gradients travel between them.
    shard: processes over which each copy's weights, gradients and optimiser are spread (FSDP);
        None: all that are left.
    tensor: processes that compute every layer together, each its heads and channels.
    """

    replicate: int = 1
    shard: int | None = None
    tensor: int = 1

    def __post_init__(self) -> None:
        check_ints("parallel", self, replicate=1, tensor=1)
        check_optional_ints("parallel", self, shard=1)


@dataclass(frozen=True)
class ResilienceConfig:
    """What a run does about steps that went wrong and processes that no longer answer.

    A step is skipped, weights untouched, if its loss or gradient is not finite, or if its loss is
    more than `spike_factor` times the median of the last `spike_window` used ones (None: never).
    After more than `max_skips` in a row the run stops with a diagnosis, or goes back to the last
    checkpoint before them and continues with other data, at most `max_rewinds` times.
    `hang_seconds`: a process that stands still this long ends the run, which says where it stood.
    """

    max_skips: int = 10
    on_exceed: OnExceed = OnExceed.STOP
    max_rewinds: int = 3
    spike_factor: float | None = None
    spike_window: int = 100
    hang_seconds: float = 1800.0

    def __post_init__(self) -> None:
        check_ints("resilience", self, max_skips=0, max_rewinds=1, spike_window=2)
        if self.spike_factor is not None:
            check_greater("resilience", self, 1.0, "spike_factor")
        check_number("resilience.hang_seconds", self.hang_seconds, 1.0)


@dataclass(frozen=True)
class LoggingConfig:
    """What is measured how often, and who gets the numbers besides metrics.jsonl.

    sinks: tools that show them; their runs are named after the run directory, in `project`.
    tensorboard: the same as naming it in `sinks`.
    peak_flops: what one device can do in a second at best, for the share of it that is used (MFU);
        None: known for some GPUs in bf16, otherwise no share is given.
    """

    every_steps: int = 1
    tensorboard: bool = False
    sinks: tuple[Sink, ...] = ()
    project: str = "sambay"
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        check_ints("logging", self, every_steps=1)
        is_once = len(set(self.sinks)) == len(self.sinks)
        check(is_once, "logging.sinks", [sink.value for sink in self.sinks], "each once")
        is_name = bool(self.project) and "/" not in self.project
        check(is_name, "logging.project", self.project, "a name without '/'")
        if self.peak_flops is not None:
            check_number("logging.peak_flops", self.peak_flops, 1.0)

    @property
    def all_sinks(self) -> tuple[Sink, ...]:
        """The sinks, with TensorBoard if it was asked for by its own field."""
        is_extra = self.tensorboard and Sink.TENSORBOARD not in self.sinks
        return (Sink.TENSORBOARD, *self.sinks) if is_extra else self.sinks
