"""What a training run IS: frozen dataclasses, checked when made, to and from JSON; no torch.

Every number that changes the result of a run is a field here and is stored with its checkpoints.
`learning` has the sections that decide what is learnt, `running` those that decide how a run goes
on, `run` puts them together, and `from_json` reads them with errors that name the field.
"""

from sambay.train.config.from_json import value_from_json
from sambay.train.config.learning import (
    DEFAULT_DECAY_FRACTION,
    BatchConfig,
    DataConfig,
    MixtureSource,
    OptimizerConfig,
    Packing,
    RegularisationConfig,
    ScheduleConfig,
    ScheduleKind,
)
from sambay.train.config.run import FORMAT_VERSION, RunConfig, read_run_config
from sambay.train.config.running import (
    ActivationCheckpointing,
    CheckpointConfig,
    Device,
    EvaluationConfig,
    LoggingConfig,
    OnExceed,
    ParallelConfig,
    Precision,
    ResilienceConfig,
    Sink,
)

__all__ = [
    "DEFAULT_DECAY_FRACTION",
    "FORMAT_VERSION",
    "ActivationCheckpointing",
    "BatchConfig",
    "CheckpointConfig",
    "DataConfig",
    "Device",
    "EvaluationConfig",
    "LoggingConfig",
    "MixtureSource",
    "OnExceed",
    "OptimizerConfig",
    "Packing",
    "ParallelConfig",
    "Precision",
    "RegularisationConfig",
    "ResilienceConfig",
    "RunConfig",
    "ScheduleConfig",
    "ScheduleKind",
    "Sink",
    "read_run_config",
    "value_from_json",
]
