"""Retrieval on one processor: 361 thousand parameters, rows of 256 tokens, documents apart.

Every architecture has the hidden size of the Transformer++, and the size of its MLPs makes up for
what its mixers hold more or less, so that parameters agree within one percent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sambay.errors import ConfigError, nearest
from sambay.layers.roles import Role
from sambay.scaling.iso import same_size_by_mlp
from sambay.scaling.rules import RULES, Base
from sambay.spec import InitScheme, Parametrization, RecurrentKind, presets
from sambay.spec.footprint import parameter_count
from sambay.spec.model_config import ModelConfig
from sambay.train.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    MixtureSource,
    OptimizerConfig,
    Packing,
    RunConfig,
    ScheduleConfig,
    ScheduleKind,
)

DEPTH, HIDDEN, INTERMEDIATE = 8, 64, 128  # of the Transformer++
HEAD_DIM, HEADS, KEY_HEADS = 16, 4, 2  # even, as differential attention needs
VOCABULARY, WINDOW = 1024, 32
LENGTH, ROWS = 256, 8
TOKENS = 3000 * ROWS * LENGTH
# Numbers written again and again teach to look up, and short books what for. Chains take more of
# them than the other texts leave room for, so they have a mixture of their own.
MIXTURES = {
    "look-ups": {
        "text": 0.05, "short_books": 0.4, "books": 0.1, "chains": 0.1, "needles": 0.05,
        "repeats": 0.3,
    },
    "chains": {
        "text": 0.05, "short_books": 0.15, "short_chains": 0.3, "chains": 0.25, "repeats": 0.25,
    },
}  # fmt: skip
# With this rate a SambaY learns to copy random tokens in 320 steps of 2,048; with half of it in
# about 450, with 5e-3 not in 700, though the loss on text falls faster then.
RATE = 2e-3
_RULES = RULES[Parametrization.MUP_PLUS_PLUS]
_RECURRENT_SIZES: dict[RecurrentKind, dict[str, int]] = {
    RecurrentKind.MAMBA: {},
    RecurrentKind.MAMBA2: {"d_state": 16, "recurrent_head_dim": 16},
    RecurrentKind.GATED_DELTA: {"d_state": 16, "recurrent_head_dim": 32},
}


def small_retrieval(
    architecture: str = "sambay",
    window: int = WINDOW,
    seed: int = 1,
    tokens: int = TOKENS,
    rate: float = RATE,
    data: str = "data/retrieval",
    mixture: str = "look-ups",
) -> RunConfig:
    """Retrieval on one processor: text, phone books, chains, repeats, in rows of 256 tokens.

    Raises:
        ConfigError: a mixture that is neither "look-ups" nor "chains".
    """
    if mixture not in MIXTURES:
        raise ConfigError(f"mixture = '{mixture}' does not exist{nearest(mixture, MIXTURES)}")
    # The rate is that of this very size, so depth and batch leave it as it is.
    base = Base(learning_rate=rate, depth=DEPTH, batch_tokens=ROWS * LENGTH)
    quarter = max(tokens // (ROWS * LENGTH) // 4, 1)
    return RunConfig(
        model=small_model(architecture, window),
        data=DataConfig(
            sequence_length=LENGTH,
            separate_documents=True,
            packing=Packing.BEST_FIT,
            mixture=tuple(
                MixtureSource(str(Path(data) / name), share)
                for name, share in MIXTURES[mixture].items()
            ),
        ),
        optimizer=OptimizerConfig(
            peak_learning_rate=_RULES.peak_learning_rate(
                DEPTH, batch_tokens=ROWS * LENGTH, base=base
            ),
            vector_weight_decay=_RULES.weight_decay(Role.VECTOR),
        ),
        # Looking up is learned at the full rate, all of a sudden and late.
        schedule=ScheduleConfig(
            total_tokens=tokens,
            warmup_tokens=tokens // 50,
            kind=ScheduleKind.WSD,
            decay_fraction=0.3,
        ),
        batch=BatchConfig(global_batch_size=ROWS, micro_batch_size=ROWS),
        evaluation=EvaluationConfig(every_steps=quarter, max_tokens=65_536),
        checkpoint=CheckpointConfig(every_steps=quarter, keep=1, asynchronous=False),
        init_scheme=InitScheme.MUP_PUBLISHED,
        seed=seed,
    )


def small_model(architecture: str, window: int = WINDOW) -> ModelConfig:
    """The model of an architecture; `window` is ignored by those that have none."""
    target = parameter_count(_model("transformer++", window), embeddings=False)
    return same_size_by_mlp(_model(architecture, window), target)


def _model(architecture: str, window: int) -> ModelConfig:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "head_dim": HEAD_DIM,
        "num_heads": HEADS,
        "num_kv_heads": KEY_HEADS,
    }
    published = presets.build(architecture, DEPTH, **sizes)
    if published.window is not None:
        sizes["window"] = window
    sizes |= _RECURRENT_SIZES[published.recurrent_kind]
    return presets.build(architecture, DEPTH, **sizes)
