"""What a training run IS: frozen dataclasses, checked when made, to and from JSON; no torch.

Every number that changes the result of a run is a field here and is stored with its checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from sambay.data.mixture import whole_weights
from sambay.errors import ConfigError, nearest
from sambay.spec import InitScheme, ModelConfig

FORMAT_VERSION = 1
DEFAULT_DECAY_FRACTION = 2 / 7
_Section = TypeVar("_Section")


class Precision(StrEnum):
    """The number format of the forward and backward pass; weights and optimiser are always fp32."""

    FP32 = "fp32"
    BF16 = "bf16"


class ScheduleKind(StrEnum):
    """How the learning rate goes on after the warm-up."""

    LINEAR = "linear"
    CONSTANT = "constant"
    COSINE = "cosine"
    WSD = "wsd"


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


class Device(StrEnum):
    """Where to compute; "auto" takes CUDA if torch sees it."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def _check(correct: bool, name: str, value: object, must: str) -> None:
    if not correct:
        raise ConfigError(f"{name} = {value!r}; it must be {must}")


def _check_int(name: str, value: int, minimum: int) -> None:
    _check(isinstance(value, int) and value >= minimum, name, value, f"a whole number >= {minimum}")


def _check_number(name: str, value: float, low: float, high: float = math.inf) -> None:
    correct = isinstance(value, int | float) and math.isfinite(value) and low <= value <= high
    _check(correct, name, value, f"a number from {low:g} to {high:g}")


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
        _check(bool(self.directory), "data.mixture: directory", self.directory, "a folder")
        _check_number(f"data.mixture: weight of {self.directory}", self.weight, 0.0, 1.0)


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
        _check_int("data.sequence_length", self.sequence_length, 1)
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
        name = "optimizer.peak_learning_rate"
        _check_number(name, self.peak_learning_rate, 0.0)
        _check(self.peak_learning_rate > 0, name, self.peak_learning_rate, "greater than 0")
        name = "optimizer.matrix_learning_rate_factor"
        _check_number(name, self.matrix_learning_rate_factor, 0.0)
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _check_number(f"optimizer.{name}", value, 0.0, 1.0)
            _check(value < 1, f"optimizer.{name}", value, "less than 1")
        _check_number("optimizer.eps", self.eps, 0.0)
        for name in ("weight_decay", "vector_weight_decay"):
            _check_number(f"optimizer.{name}", getattr(self, name), 0.0)
        _check_number("optimizer.clip_norm", self.clip_norm, 0.0)
        _check(self.clip_norm > 0, "optimizer.clip_norm", self.clip_norm, "greater than 0")


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate as a function of tokens seen; `total_tokens` is also the run's length."""

    total_tokens: int
    warmup_tokens: int = 0
    kind: ScheduleKind = ScheduleKind.LINEAR
    minimum_factor: float = 0.0
    decay_fraction: float = DEFAULT_DECAY_FRACTION  # of what follows the warm-up; for wsd

    def __post_init__(self) -> None:
        _check_int("schedule.total_tokens", self.total_tokens, 1)
        _check_int("schedule.warmup_tokens", self.warmup_tokens, 0)
        below_total = f"at most schedule.total_tokens ({self.total_tokens})"
        correct = self.warmup_tokens <= self.total_tokens
        _check(correct, "schedule.warmup_tokens", self.warmup_tokens, below_total)
        _check_number("schedule.minimum_factor", self.minimum_factor, 0.0, 1.0)
        _check_number("schedule.decay_fraction", self.decay_fraction, 0.0, 1.0)


@dataclass(frozen=True)
class BatchConfig:
    """Sizes in sequences: what one optimiser step sees, and what one forward pass sees."""

    global_batch_size: int
    micro_batch_size: int

    def __post_init__(self) -> None:
        _check_int("batch.global_batch_size", self.global_batch_size, 1)
        _check_int("batch.micro_batch_size", self.micro_batch_size, 1)
        divides = self.global_batch_size % self.micro_batch_size == 0
        must = f"a divisor of batch.global_batch_size ({self.global_batch_size})"
        _check(divides, "batch.micro_batch_size", self.micro_batch_size, must)


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
        for name in ("label_smoothing", "attention_dropout"):
            value = getattr(self, name)
            _check_number(f"regularisation.{name}", value, 0.0, 1.0)
            _check(value < 1, f"regularisation.{name}", value, "less than 1")
        _check_number("regularisation.z_loss", self.z_loss, 0.0)
        for name in ("self_decoder_from_step", "cross_decoder_from_step"):
            if getattr(self, name) is not None:
                _check_int(f"regularisation.{name}", getattr(self, name), 0)

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
        _check_int("evaluation.every_steps", self.every_steps, 1)
        if self.max_tokens is not None:
            _check_int("evaluation.max_tokens", self.max_tokens, 1)
        for name, folder in self.sets.items():
            _check(bool(name) and "/" not in name, "evaluation.sets", name, "names without '/'")
            _check(bool(folder), f"evaluation.sets.{name}", folder, "a folder")
        _check(bool(self.lengths), "evaluation.lengths", self.lengths, "at least one multiple")
        for multiple in self.lengths:
            _check_int("evaluation.lengths", multiple, 1)
        rising = all(a < b for a, b in pairwise(self.lengths))
        _check(rising, "evaluation.lengths", self.lengths, "ascending, each once")


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
        _check_int("checkpoint.every_steps", self.every_steps, 1)
        _check_int("checkpoint.keep", self.keep, 1)
        if self.keep_every_steps is not None:
            name = "checkpoint.keep_every_steps"
            _check_int(name, self.keep_every_steps, 1)
            must = f"a multiple of checkpoint.every_steps ({self.every_steps})"
            divides = self.keep_every_steps % self.every_steps == 0
            _check(divides, name, self.keep_every_steps, must)


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
        _check_int("parallel.replicate", self.replicate, 1)
        if self.shard is not None:
            _check_int("parallel.shard", self.shard, 1)
        _check_int("parallel.tensor", self.tensor, 1)


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
        _check_int("resilience.max_skips", self.max_skips, 0)
        _check_int("resilience.max_rewinds", self.max_rewinds, 1)
        if self.spike_factor is not None:
            name = "resilience.spike_factor"
            _check_number(name, self.spike_factor, 1.0)
            _check(self.spike_factor > 1, name, self.spike_factor, "greater than 1")
        _check_int("resilience.spike_window", self.spike_window, 2)
        _check_number("resilience.hang_seconds", self.hang_seconds, 1.0)


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
        _check_int("logging.every_steps", self.every_steps, 1)
        is_once = len(set(self.sinks)) == len(self.sinks)
        _check(is_once, "logging.sinks", [sink.value for sink in self.sinks], "each once")
        is_name = bool(self.project) and "/" not in self.project
        _check(is_name, "logging.project", self.project, "a name without '/'")
        if self.peak_flops is not None:
            _check_number("logging.peak_flops", self.peak_flops, 1.0)

    @property
    def all_sinks(self) -> tuple[Sink, ...]:
        """The sinks, with TensorBoard if it was asked for by its own field."""
        is_extra = self.tensorboard and Sink.TENSORBOARD not in self.sinks
        return (Sink.TENSORBOARD, *self.sinks) if is_extra else self.sinks


@dataclass(frozen=True)
class RunConfig:
    """Everything a training run needs to know."""

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    batch: BatchConfig
    regularisation: RegularisationConfig = field(default_factory=RegularisationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    precision: Precision = Precision.FP32
    init_scheme: InitScheme = InitScheme.MUP_RELEASED
    seed: int = 0
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.NONE
    compile: bool = False  # the blocks, one by one, with torch.compile
    device: Device = Device.AUTO
    threads: int | None = None  # None: as many as torch chooses

    def __post_init__(self) -> None:
        _check_int("seed", self.seed, 0)
        if self.threads is not None:
            _check_int("threads", self.threads, 1)
        if self.num_steps < 1:
            raise ConfigError(
                f"schedule.total_tokens = {self.schedule.total_tokens} is less than one step of "
                f"{self.tokens_per_step} tokens (batch.global_batch_size x data.sequence_length); "
                "raise it or use a smaller batch"
            )

    @property
    def tokens_per_step(self) -> int:
        return self.batch.global_batch_size * self.data.sequence_length

    @property
    def num_steps(self) -> int:
        """Whole steps within the token budget; what is left over is not trained on."""
        return self.schedule.total_tokens // self.tokens_per_step

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary that `from_dict` turns back into an equal configuration."""
        values: dict[str, Any] = {"format_version": FORMAT_VERSION, "model": self.model.to_dict()}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name != "model":
                values[item.name] = _plain(value)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """The configuration written by `to_dict`; absent fields take their defaults.

        Raises:
            ConfigError: an unknown or missing field, a value of the wrong type, or a newer format.
        """
        values = dict(values)
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"format_version = {version!r}; this version of sambay reads {FORMAT_VERSION}, so "
                "this is not a run configuration or was written by another version"
            )
        return _section_from_dict(cls, values, "")


def read_run_config(path: Path) -> RunConfig:
    """The configuration in a run's config.json.

    Raises:
        ConfigError: the file is missing, is not JSON, or does not describe a run (names the file).
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; give the path of a run's config.json") from error
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as a run configuration: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a run configuration: it holds no JSON object")
    try:
        return RunConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        names = [item.name for item in dataclasses.fields(value)]
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, StrEnum) else value


def _section_from_dict(cls: type[_Section], values: dict[str, Any], prefix: str) -> _Section:
    hints = get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise ConfigError(f"unknown field '{prefix}{name}'{nearest(name, hints)}")
    made: dict[str, Any] = {}
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]
        if item.name not in values:
            required = item.default is dataclasses.MISSING
            if required and item.default_factory is dataclasses.MISSING:
                raise ConfigError(f"field '{prefix}{item.name}' is missing")
            continue
        value, hint = values[item.name], hints[item.name]
        made[item.name] = value_from_json(value, hint, f"{prefix}{item.name}")
    return cls(**made)


def value_from_json(value: Any, hint: Any, name: str) -> Any:
    """The value of a field of type `hint` that JSON gives as `value`; errors name the field."""
    if hint is ModelConfig:
        _check(isinstance(value, dict), name, value, "a group of fields")
        return ModelConfig.from_dict(value)
    if dataclasses.is_dataclass(hint):
        _check(isinstance(value, dict), name, value, "a group of fields")
        assert isinstance(hint, type)
        return _section_from_dict(hint, value, f"{name}.")
    if get_origin(hint) is tuple:
        _check(isinstance(value, list | tuple), name, value, "a list")
        item = get_args(hint)[0]
        return tuple(value_from_json(one, item, f"{name}[{at}]") for at, one in enumerate(value))
    if get_origin(hint) is dict:
        correct = isinstance(value, dict) and all(isinstance(one, str) for one in value.values())
        _check(correct, name, value, "an object of names and texts")
        return dict(value)
    if hint is ActivationCheckpointing and isinstance(value, bool):  # as older versions wrote it
        value = ActivationCheckpointing.FULL if value else ActivationCheckpointing.NONE
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        names = [member.value for member in hint]
        if value not in names:
            hint_text = nearest(str(value), names)
            raise ConfigError(f"{name} = {value!r} is not a known value{hint_text}")
        return hint(value)
    if type(None) in get_args(hint):
        return None if value is None else value_from_json(value, get_args(hint)[0], name)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    allowed = {int: int, float: float, bool: bool, str: str}[hint]
    correct = isinstance(value, allowed) and (hint is bool or not isinstance(value, bool))
    _check(correct, name, value, str(getattr(hint, "__name__", hint)))
    return value
