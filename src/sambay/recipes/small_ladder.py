"""A scaling ladder for one processor: depth 8 to 24, 33 thousand to 0.9 million parameters.

Every run reads the same tokens in the same order. Every architecture has the hidden size of the
Transformer++ of its depth, and the size of its MLPs makes up for what its mixers hold more or less,
so that parameters agree within one percent. A search for the hidden size, as published, would be
too coarse here: at a width of 16 one more makes a model 12 % larger.
"""

from __future__ import annotations

from sambay.layers.roles import Role
from sambay.scaling.iso import same_size_by_mlp
from sambay.scaling.rules import RULES, Base
from sambay.spec import Parametrization, RecurrentKind, presets
from sambay.spec.footprint import parameter_count
from sambay.spec.model_config import ModelConfig
from sambay.train.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
)

ASPECT_RATIO, HEAD_DIM, WINDOW, VOCABULARY = 2, 4, 32, 512
LENGTH, ROWS = 128, 16
TOKENS = 1088 * ROWS * LENGTH  # 67 per parameter at depth 8, 20 at depth 12, 2.5 at depth 24
_RECURRENT_SIZES: dict[RecurrentKind, dict[str, int]] = {
    RecurrentKind.MAMBA: {},
    RecurrentKind.MAMBA2: {"d_state": 16, "recurrent_head_dim": 4},
    RecurrentKind.GATED_DELTA: {"d_state": 8, "recurrent_head_dim": 16},
}
# Of 4e-3, 8e-3, ... 6.4e-2 the best at depth 8 for the Transformer++ and for the SambaY.
RATE = 1.6e-2


def small_ladder(
    architecture: str = "sambay",
    depth: int = 8,
    seed: int = 1,
    tokens: int = TOKENS,
    rate: float = RATE,
    parametrization: Parametrization = Parametrization.MUP_PLUS_PLUS,
) -> RunConfig:
    """Scaling on one processor: depth 8 to 24, equal parameters, tokens and order of data."""
    rules = RULES[parametrization]
    base = Base(learning_rate=rate, batch_tokens=ROWS * LENGTH)
    quarter = max(tokens // (ROWS * LENGTH) // 4, 1)
    return RunConfig(
        model=small_model(architecture, depth, parametrization),
        data=DataConfig("data/stdlib", sequence_length=LENGTH),
        optimizer=OptimizerConfig(
            peak_learning_rate=rules.peak_learning_rate(depth, base=base),
            matrix_learning_rate_factor=rules.learning_rate_factor(Role.MATRIX, depth),
            vector_weight_decay=rules.weight_decay(Role.VECTOR),
        ),
        schedule=ScheduleConfig(total_tokens=tokens, warmup_tokens=tokens // 20),
        batch=BatchConfig(global_batch_size=ROWS, micro_batch_size=ROWS),
        evaluation=EvaluationConfig(every_steps=quarter),
        checkpoint=CheckpointConfig(every_steps=quarter, keep=1, asynchronous=False),
        init_scheme=rules.init_scheme,
        seed=seed,
    )


def small_model(
    architecture: str, depth: int, parametrization: Parametrization = Parametrization.MUP_PLUS_PLUS
) -> ModelConfig:
    """The model of a rung, with the size of its MLPs chosen for equal parameters."""
    target = parameter_count(_model("transformer++", depth, parametrization), embeddings=False)
    return same_size_by_mlp(_model(architecture, depth, parametrization), target)


def _model(architecture: str, depth: int, parametrization: Parametrization) -> ModelConfig:
    heads = depth // 2  # with keys of their own; an even number, as differential attention needs
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": ASPECT_RATIO * depth,
        "head_dim": HEAD_DIM,
        "num_heads": heads,
        "num_kv_heads": heads,
    }
    published = presets.build(architecture, depth, parametrization=parametrization, **sizes)
    if published.window is not None:
        sizes["window"] = WINDOW
    sizes |= _RECURRENT_SIZES[published.recurrent_kind]
    return presets.build(architecture, depth, parametrization=parametrization, **sizes)
