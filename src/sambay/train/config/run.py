"""What a training run IS: all sections together, checked when made, to and from JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sambay.errors import ConfigError
from sambay.spec import InitScheme, ModelConfig
from sambay.train.config.checks import check_ints, check_optional_ints
from sambay.train.config.from_json import plain_value, section_from_json
from sambay.train.config.learning import (
    BatchConfig,
    DataConfig,
    OptimizerConfig,
    RegularisationConfig,
    ScheduleConfig,
)
from sambay.train.config.running import (
    ActivationCheckpointing,
    CheckpointConfig,
    Device,
    EvaluationConfig,
    LoggingConfig,
    ParallelConfig,
    Precision,
    ResilienceConfig,
)

FORMAT_VERSION = 1


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
        check_ints("", self, seed=0)
        check_optional_ints("", self, threads=1)
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
                values[item.name] = plain_value(value)
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
        return section_from_json(cls, values, "")


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
