"""The scaling runs of arXiv 2507.06607 (section 3, appendices C and D) on SlimPajama.

The data is text with the Llama-2 tokenizer (32,000 entries), documents one after another.
"""

from __future__ import annotations

from typing import Any

from sambay.scaling.horizon import WARMUP_TOKENS, Horizon, RunScale, run_scale, token_budget
from sambay.scaling.rules import RULES
from sambay.spec import Parametrization, presets
from sambay.train.config import (
    ActivationCheckpointing,
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    Precision,
    RunConfig,
    ScheduleConfig,
)

LENGTH, ROWS = 4096, 512  # a step of 2^21 tokens
_MICRO_ROWS = 4


def sambay_1b() -> RunConfig:
    """SambaY at depth 16: 1,065,818,688 parameters, 101.4 B tokens."""
    return ladder("sambay", 16)


def transformer_1b() -> RunConfig:
    """Transformer++ at depth 16: 1.04 B parameters, 100 B tokens."""
    return ladder("transformer++", 16)


def ladder(
    architecture: str = "sambay",
    depth: int = 16,
    parametrization: Parametrization = Parametrization.MUP_PLUS_PLUS,
) -> RunConfig:
    """FLOPs scaling (figure 2a): depth 8 to 24, tokens in proportion to parameters."""
    tokens = token_budget(architecture, depth)
    return scaling_run(architecture, depth, tokens, parametrization)


def data_scaling(
    architecture: str = "sambay",
    tokens: int = 100_000_000_000,
    parametrization: Parametrization = Parametrization.MUP_PLUS_PLUS,
    horizon: Horizon = Horizon.CONSTANT,
) -> RunConfig:
    """Data scaling (figure 2b): depth 16 on 100 to 600 B tokens, each a whole run."""
    return scaling_run(architecture, 16, tokens, parametrization, horizon)


def scaling_run(
    architecture: str,
    depth: int,
    tokens: int,
    parametrization: Parametrization = Parametrization.MUP_PLUS_PLUS,
    horizon: Horizon = Horizon.CONSTANT,
    **model_fields: Any,
) -> RunConfig:
    """A run in the published setting: bf16, 2^21 tokens per step, linear decay to zero."""
    scale = run_scale(
        depth,
        tokens,
        parametrization=parametrization,
        horizon=horizon,
        batch_multiple=_MICRO_ROWS * LENGTH,
    )
    return published_run(
        model=presets.build(architecture, depth, parametrization=parametrization, **model_fields),
        data=DataConfig("data/slimpajama", sequence_length=LENGTH),
        optimizer=optimizer_of(scale),
        schedule=ScheduleConfig(total_tokens=tokens, warmup_tokens=WARMUP_TOKENS),
        batch=BatchConfig(scale.batch_tokens // LENGTH, micro_batch_size=_MICRO_ROWS),
        # As published: 200 rows of four lengths, of which also shorter beginnings are measured.
        evaluation=EvaluationConfig(
            every_steps=1000, max_tokens=200 * 4 * LENGTH, lengths=(1, 2, 3, 4)
        ),
        init_scheme=RULES[parametrization].init_scheme,
    )


def optimizer_of(scale: RunScale) -> OptimizerConfig:
    """AdamW with the rates and weight decays of a run; betas, epsilon and clipping as published."""
    return OptimizerConfig(
        peak_learning_rate=scale.peak_learning_rate,
        matrix_learning_rate_factor=scale.matrix_learning_rate_factor,
        weight_decay=scale.weight_decay,
        vector_weight_decay=scale.vector_weight_decay,
    )


def published_run(**sections: Any) -> RunConfig:
    """A run with what all published ones share: bf16, every block computed again, one seed."""
    shared: dict[str, Any] = {
        "checkpoint": CheckpointConfig(every_steps=500),
        "precision": Precision.BF16,
        "activation_checkpointing": ActivationCheckpointing.FULL,
        "seed": 3407,
    }
    return RunConfig(**(shared | sections))
