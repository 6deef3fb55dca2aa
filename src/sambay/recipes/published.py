"""The published 1B models (arXiv 2507.06607, section 3.1, table 7, appendix D): depth 16, muP++."""

from __future__ import annotations

from sambay.spec import ModelConfig, presets
from sambay.train.config import (
    ActivationCheckpointing,
    BatchConfig,
    DataConfig,
    OptimizerConfig,
    Precision,
    RunConfig,
    ScheduleConfig,
)


def sambay_1b() -> RunConfig:
    """SambaY at depth 16: 1,065,818,688 parameters, 101.4 B tokens."""
    return _run(presets.build("sambay", 16), total_tokens=101_400_000_000)


def transformer_1b() -> RunConfig:
    """Transformer++ at depth 16: 1.04 B parameters, 100 B tokens."""
    return _run(presets.build("transformer++", 16), total_tokens=100_000_000_000)


def _run(model: ModelConfig, total_tokens: int) -> RunConfig:
    return RunConfig(
        model=model,
        data=DataConfig("data/slimpajama", sequence_length=4096),
        # At depth 16, the base of muP++, matrices have the same rate as the rest.
        optimizer=OptimizerConfig(peak_learning_rate=4e-4),
        schedule=ScheduleConfig(total_tokens=total_tokens, warmup_tokens=1_000_000_000),
        batch=BatchConfig(global_batch_size=512, micro_batch_size=4),
        precision=Precision.BF16,
        activation_checkpointing=ActivationCheckpointing.FULL,
        seed=3407,
    )
