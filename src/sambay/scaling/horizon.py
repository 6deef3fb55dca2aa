"""Tokens, batch and learning rate of a run as functions of its depth (no torch).

Source: arXiv 2507.06607, section 3.1, appendices C and D, tables 6 and 7.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from sambay.errors import ConfigError
from sambay.layers.roles import Role
from sambay.scaling.iso import REFERENCE, nominal_parameters
from sambay.scaling.rules import PUBLISHED_BASE, RULES, Base
from sambay.spec import Parametrization

WARMUP_TOKENS = 1_000_000_000


class Horizon(StrEnum):
    """What changes with the tokens of a run; the published main results are "constant".

    batch: B = B0 sqrt(T/T0), and the rate with the root of the batch. The paper says only that it
        grows more slowly than the tokens; the square root is an assumption.
    rate: the rate falls with (T0/T)^(1/3) and the weight decay rises as 1/rate, so that their
        product stays.
    """

    CONSTANT = "constant"
    BATCH = "batch"
    RATE = "rate"


@dataclass(frozen=True)
class RunScale:
    """The numbers of a run that follow from its depth and tokens.

    `weight_decay` is that of matrices, `vector_weight_decay` that of all others.
    """

    tokens: int
    batch_tokens: int
    peak_learning_rate: float
    matrix_learning_rate_factor: float
    weight_decay: float
    vector_weight_decay: float


def token_budget(architecture: str, depth: int, base: Base = PUBLISHED_BASE) -> int:
    """The tokens of a run of the FLOPs ladder, in proportion to the parameters.

    About 103 per nominal parameter: T = T0 N(depth) / N0, with N0 the Transformer++ at the base
    depth for every architecture.

    Raises:
        ConfigError: an unknown architecture, or a depth it cannot have.
    """
    return tokens_for(nominal_parameters(architecture, depth), base)


def tokens_for(parameters: int, base: Base = PUBLISHED_BASE) -> int:
    """The tokens of a model of `parameters`, as many to each as the base run had."""
    return base.tokens * parameters // base.parameters


def published_flops(depth: int) -> int:
    """The FLOPs that the paper plots any architecture of a depth at: 6 N T of the Transformer++.

    N is its published count, T its token budget; attention and embeddings are left out.

    Raises:
        ConfigError: a depth that is not a multiple of four.
    """
    return 6 * nominal_parameters(REFERENCE, depth) * token_budget(REFERENCE, depth)


def run_scale(
    depth: int,
    tokens: int,
    *,
    parametrization: Parametrization = Parametrization.MUP_PLUS_PLUS,
    horizon: Horizon = Horizon.CONSTANT,
    base: Base = PUBLISHED_BASE,
    batch_multiple: int = 1,
) -> RunScale:
    """Batch, rates and weight decays of a run of a depth on `tokens`.

    The batch is rounded down to a multiple of `batch_multiple` tokens (at least one), and the rate
    follows the rounded one.

    Raises:
        ConfigError: a depth, tokens or multiple below 1.
    """
    for name, value in (("depth", depth), ("tokens", tokens), ("batch_multiple", batch_multiple)):
        if value < 1:
            raise ConfigError(f"{name} = {value}; it must be 1 or more")
    rules = RULES[parametrization]
    batch = base.batch_tokens
    if horizon is Horizon.BATCH:
        batch = math.floor(batch * math.sqrt(tokens / base.tokens))
    batch = max(batch // batch_multiple, 1) * batch_multiple
    rate = rules.peak_learning_rate(depth, batch, base)
    decay_factor = 1.0
    if horizon is Horizon.RATE:
        rate *= (base.tokens / tokens) ** (1 / 3)
        decay_factor = base.learning_rate / rate
    return RunScale(
        tokens=tokens,
        batch_tokens=batch,
        peak_learning_rate=rate,
        matrix_learning_rate_factor=rules.learning_rate_factor(Role.MATRIX, depth, base),
        weight_decay=rules.weight_decay(Role.MATRIX) * decay_factor,
        vector_weight_decay=rules.weight_decay(Role.VECTOR) * decay_factor,
    )
