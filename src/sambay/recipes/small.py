"""Models of about 21 M parameters that a laptop trains in hours."""

from __future__ import annotations

from typing import Any

from sambay.spec import ModelConfig, presets
from sambay.train.config import (
    BatchConfig,
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
)


def sambay_20m() -> RunConfig:
    """A SambaY of 21.1 M parameters."""
    return _run(_model("sambay", hidden_size=384))


def transformer_20m() -> RunConfig:
    """A Transformer++ of 21.1 M parameters."""
    return _run(_model("transformer++", hidden_size=400))


def _model(name: str, **fields: Any) -> ModelConfig:
    return presets.build(
        name, 8, vocab_size=4096, head_dim=64, num_heads=8, num_kv_heads=2, **fields
    )


def _run(model: ModelConfig) -> RunConfig:
    return RunConfig(
        model=model,
        data=DataConfig("data", sequence_length=1024),
        optimizer=OptimizerConfig(peak_learning_rate=1e-3),
        schedule=ScheduleConfig(total_tokens=100_000_000, warmup_tokens=2_000_000),
        batch=BatchConfig(global_batch_size=16, micro_batch_size=4),
        evaluation=EvaluationConfig(every_steps=250, max_tokens=262_144),
    )
