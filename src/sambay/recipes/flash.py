"""Pre-training of Phi4-mini-Flash (arXiv 2507.06607, section 3.3 and appendix D)."""

from __future__ import annotations

from sambay.spec import InitScheme, presets
from sambay.train.config import (
    ActivationCheckpointing,
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    Precision,
    RegularisationConfig,
    RunConfig,
    ScheduleConfig,
)

_LENGTH, _ROWS = 8192, 1024
_WARMUP_STEPS = 3000


def phi4_mini_flash() -> RunConfig:
    """Phi4-mini-Flash from scratch: 3.85 B parameters, 5 T tokens in rows of 8K.

    Standard parametrisation, where weight decay acts on everything. The attention dropout begins
    at the last checkpoints before the two divergences of the published run. Betas and epsilon of
    AdamW are those of the scaling runs; the paper does not give them for this one.
    """
    return RunConfig(
        model=presets.phi4_mini_flash(),
        data=DataConfig("data/phi4-mini", sequence_length=_LENGTH),
        optimizer=OptimizerConfig(
            peak_learning_rate=5e-4, weight_decay=0.1, vector_weight_decay=0.1
        ),
        schedule=ScheduleConfig(
            total_tokens=5_000_000_000_000, warmup_tokens=_WARMUP_STEPS * _ROWS * _LENGTH
        ),
        batch=BatchConfig(global_batch_size=_ROWS, micro_batch_size=1),
        regularisation=RegularisationConfig(
            label_smoothing=0.1,
            attention_dropout=0.05,
            self_decoder_from_step=310_000,
            cross_decoder_from_step=520_000,
        ),
        evaluation=EvaluationConfig(every_steps=1000, max_tokens=2**24),
        checkpoint=CheckpointConfig(every_steps=500, keep_every_steps=10_000),
        precision=Precision.BF16,
        activation_checkpointing=ActivationCheckpointing.FULL,
        init_scheme=InitScheme.STANDARD,
        seed=3407,
    )
