"""Pre-training of Phi4-mini-Flash (arXiv 2507.06607, section 3.3 and appendix D)."""

from __future__ import annotations

from sambay.recipes.published import optimizer_of, published_run
from sambay.scaling.horizon import run_scale
from sambay.scaling.rules import RULES, Base
from sambay.spec import Parametrization, presets
from sambay.train.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    RegularisationConfig,
    RunConfig,
    ScheduleConfig,
)

_LENGTH, _ROWS = 8192, 1024
_STEP_TOKENS = _LENGTH * _ROWS
_TOKENS = 5_000_000_000_000
_WARMUP_STEPS = 3000


def phi4_mini_flash() -> RunConfig:
    """Phi4-mini-Flash from scratch: 3.85 B parameters, 5 T tokens in rows of 8K.

    Standard parametrisation, where weight decay acts on everything. The attention dropout begins
    at the last checkpoints before the two divergences of the published run. Betas and epsilon of
    AdamW are those of the scaling runs; the paper does not give them for this one.
    """
    model = presets.phi4_mini_flash()
    own = Base(learning_rate=5e-4, depth=model.num_layers, batch_tokens=_STEP_TOKENS)
    scale = run_scale(model.num_layers, _TOKENS, parametrization=Parametrization.STANDARD, base=own)
    return published_run(
        model=model,
        data=DataConfig("data/phi4-mini", sequence_length=_LENGTH),
        optimizer=optimizer_of(scale),
        schedule=ScheduleConfig(total_tokens=_TOKENS, warmup_tokens=_WARMUP_STEPS * _STEP_TOKENS),
        batch=BatchConfig(global_batch_size=_ROWS, micro_batch_size=1),
        regularisation=RegularisationConfig(
            label_smoothing=0.1,
            attention_dropout=0.05,
            self_decoder_from_step=310_000,
            cross_decoder_from_step=520_000,
        ),
        evaluation=EvaluationConfig(every_steps=1000, max_tokens=2**24),
        checkpoint=CheckpointConfig(every_steps=500, keep_every_steps=10_000),
        init_scheme=RULES[Parametrization.STANDARD].init_scheme,
    )
