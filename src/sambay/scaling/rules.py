"""SP, muP and muP++ as tables: from a parameter's role to its rate, weight decay and first value.

A run of any depth follows from a table and from the `Base` at which the learning rate was tuned.
Source: arXiv 2507.06607, section 3.1, appendix D and table 6; the exceptions of the first weights
are those of the released code. Width grows with depth, so d0/d stands for both. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sambay.layers.roles import Role
from sambay.scaling.iso import REFERENCE, nominal_parameters
from sambay.spec import InitScheme, Parametrization
from sambay.spec.parametrization import BASE_DEPTH

WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Base:
    """The run whose learning rate was tuned, and the horizon it had; by default the published one.

    `parameters` count without embeddings, by the published formula; they and `tokens` fix how many
    tokens a parameter gets.
    """

    learning_rate: float = 4e-4
    depth: int = BASE_DEPTH
    batch_tokens: int = 2**21
    tokens: int = 100_000_000_000
    parameters: int = nominal_parameters(REFERENCE, BASE_DEPTH)


PUBLISHED_BASE = Base()


@dataclass(frozen=True)
class RoleRule:
    """What a table says of one role: the rate has a factor (d0/d)^rate_power."""

    rate_power: int
    weight_decay: float


@dataclass(frozen=True)
class ScalingRules:
    """One table: what follows from depth and batch for every role, and for the model itself.

    `peak_power` is the power of d0/d in the rate of all parameters.
    """

    parametrization: Parametrization
    peak_power: float
    roles: Mapping[Role, RoleRule]
    init_scheme: InitScheme

    def peak_learning_rate(
        self, depth: int, batch_tokens: int | None = None, base: Base = PUBLISHED_BASE
    ) -> float:
        """The rate that every role's factor multiplies: with the root of the batch, and of d0/d."""
        batch = base.batch_tokens if batch_tokens is None else batch_tokens
        root = math.sqrt(batch / base.batch_tokens)
        return base.learning_rate * root * (base.depth / depth) ** self.peak_power

    def learning_rate_factor(self, role: Role, depth: int, base: Base = PUBLISHED_BASE) -> float:
        """What the peak rate is multiplied by for the parameters of a role."""
        return (base.depth / depth) ** self.roles[role].rate_power

    def weight_decay(self, role: Role) -> float:
        """The decoupled weight decay of a role, which its rate multiplies; the same at any size."""
        return self.roles[role].weight_decay

    def multipliers(self, depth: int, head_dim: int) -> dict[str, float]:
        """The fields of `ModelConfig` that scale residuals, logits and attention; others are 1.

        Relative to depth 16 and heads of 128 whatever the base of the rate is.
        """
        return self.parametrization.multipliers(depth, head_dim)


def _rules(
    parametrization: Parametrization,
    init_scheme: InitScheme,
    *,
    peak_power: float,
    matrix_power: int,
    vector_decay: float,
) -> ScalingRules:
    """Only matrices are matrix-like: in all other roles at most one dimension grows with width."""
    roles = {role: RoleRule(0, vector_decay) for role in Role}
    roles[Role.MATRIX] = RoleRule(matrix_power, WEIGHT_DECAY)
    return ScalingRules(parametrization, peak_power, roles, init_scheme)


RULES = {
    rules.parametrization: rules
    for rules in (
        _rules(
            Parametrization.STANDARD,
            InitScheme.STANDARD,
            peak_power=0,
            matrix_power=0,
            vector_decay=WEIGHT_DECAY,
        ),
        _rules(
            Parametrization.MUP,
            InitScheme.MUP_RELEASED,
            peak_power=0,
            matrix_power=1,
            vector_decay=WEIGHT_DECAY,
        ),
        _rules(
            Parametrization.MUP_PLUS_PLUS,
            InitScheme.MUP_RELEASED,
            peak_power=0.5,
            matrix_power=1,
            vector_decay=0.0,
        ),
    )
}


@dataclass(frozen=True)
class FirstWeights:
    """How the weights of a role are drawn: the rule as text, and its standard deviation."""

    text: str
    spread: float


def first_weights(
    scheme: InitScheme,
    role: Role,
    *,
    fan_in: int,
    depth: int,
    tied: bool,
    into_residual: bool = False,
) -> FirstWeights | None:
    """How a matrix, embedding or head begins; None for roles whose layers decide it themselves.

    `into_residual`: the matrix ends a mixer or an MLP. Such ones are divided by sqrt(2 depth), but
    not in untied models under muP, nor in any under the published table.
    """
    is_standard = scheme is InitScheme.STANDARD
    match role:
        case Role.EMBEDDING:
            spread = 0.02 if tied else 1e-4
            return FirstWeights(f"N(0, {spread:g})", spread)
        case Role.OUTPUT:
            return FirstWeights("N(0, 0.02)", 0.02) if is_standard else FirstWeights("0", 0.0)
        case Role.MATRIX:
            text, spread = (
                ("N(0, 0.02)", 0.02)
                if is_standard
                else ("U(+-1/sqrt(fan in))", 1 / math.sqrt(3 * fan_in))
            )
            if into_residual and (is_standard or (scheme is InitScheme.MUP_RELEASED and tied)):
                return FirstWeights(f"{text} / sqrt(2 x {depth})", spread / math.sqrt(2 * depth))
            return FirstWeights(text, spread)
        case _:
            return None
