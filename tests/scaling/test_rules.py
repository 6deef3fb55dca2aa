"""The three tables: rates and decays of the paper, which parameters they hold for, first weights.

Numbers from arXiv 2507.06607, section 3.1 and table 6, and the released code.
"""

from __future__ import annotations

import math

import pytest
import torch

from sambay.layers.projection import ResidualProjection
from sambay.layers.roles import Role
from sambay.model import LanguageModel, initialise
from sambay.model.roles import parameter_roles
from sambay.recipes.published import optimizer_of
from sambay.scaling.horizon import run_scale
from sambay.scaling.iso import nominal_parameters
from sambay.scaling.rules import PUBLISHED_BASE, RULES, Base, first_weights
from sambay.spec import InitScheme, ModelConfig, Parametrization, presets
from sambay.train.config import OptimizerConfig
from sambay.train.optim import build_optimizer

STANDARD, MUP, PLUS = (RULES[one] for one in Parametrization)

# Depth: rate of vector-like parameters, of matrices, as printed.
RATES = {8: ("5.66e-4", "1.131e-3"), 12: ("4.62e-4", "6.16e-4"), 16: ("4.00e-4", "4.00e-4"),
         20: ("3.58e-4", "2.86e-4"), 24: ("3.27e-4", "2.18e-4")}  # fmt: skip

# What each kind of layer holds: what decays under muP++, and what does not.
MATRICES = {
    "mamba": ("in_proj.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight"),
    "mamba2": ("in_proj.weight", "out_proj.weight"),
    "gated_delta": ("q_proj.weight", "k_proj.weight", "v_proj.weight", "g_proj.weight",
                    "a_proj.weight", "b_proj.weight", "out_proj.weight"),
    "S": ("q_proj.weight", "kv_proj.weight", "out_proj.weight"),
    "F": ("q_proj.weight", "kv_proj.weight", "out_proj.weight"),
    "C": ("q_proj.weight", "out_proj.weight"),
    "G": ("in_proj.weight", "out_proj.weight"),
}  # fmt: skip
OTHERS = {
    "mamba": ("conv_weight", "conv_bias", "dt_bias", "A_log", "D"),
    "mamba2": ("conv_weight", "conv_bias", "dt_bias", "A_log", "D", "norm.weight"),
    "gated_delta": ("conv_weight", "dt_bias", "A_log", "norm.weight"),
    "S": (),
    "F": (),
    "C": (),
    "G": (),
}
BIASES = ("q_proj.bias", "out_proj.bias")
LAMBDAS = tuple(
    f"maps.{name}" for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2", "norm_weight")
)


def expected_groups(config: ModelConfig) -> tuple[set[str], set[str]]:
    """All names of a model's parameters: matrices, and the rest."""
    others = {"embedding.weight", "norm.weight"}
    if not config.tie_embeddings:
        others.add("head.weight")
    matrices = set()
    if config.norm == "layer":
        others.add("norm.bias")
    for layer in config.layers:
        block = f"blocks.{layer.index}"
        kind = str(config.recurrent_kind) if layer.kind == "M" else str(layer.kind)
        matrices |= {f"{block}.mlp.in_proj.weight", f"{block}.mlp.out_proj.weight"}
        matrices |= {f"{block}.mixer.{name}" for name in MATRICES[kind]}
        others |= {f"{block}.mixer.{name}" for name in OTHERS[kind]}
        others |= {f"{block}.mixer_norm.weight", f"{block}.mlp_norm.weight"}
        if config.norm == "layer":
            others |= {f"{block}.mixer_norm.bias", f"{block}.mlp_norm.bias"}
        if layer.kind == "G" and config.gated_memory == "normalised":
            others.add(f"{block}.mixer.norm.weight")
        if layer.kind in ("S", "F", "C"):
            if config.attention_variant == "differential":
                others |= {f"{block}.mixer.{name}" for name in LAMBDAS}
            if config.attention_bias:
                own = ("kv_proj.bias",) if layer.kind != "C" else ()
                others |= {f"{block}.mixer.{name}" for name in (*BIASES, *own)}
    return matrices, others


def groups_of(model: LanguageModel, optimizer: OptimizerConfig) -> dict[float, set[str]]:
    """The names that AdamW has, by their weight decay."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        group["weight_decay"]: {names[id(one)] for one in group["params"]}
        for group in build_optimizer(model, optimizer).param_groups
    }


@pytest.mark.parametrize("depth", RATES)
def test_the_rates_of_the_paper(depth: int) -> None:
    """To the printed digits."""
    peak = PLUS.peak_learning_rate(depth)
    for printed, role in zip(RATES[depth], (Role.VECTOR, Role.MATRIX), strict=True):
        rate = peak * PLUS.learning_rate_factor(role, depth)
        digits = len(printed.partition("e")[0]) - 2
        assert f"{rate:.{digits}e}".replace("e-0", "e-") == printed


@pytest.mark.parametrize("depth", [4, 16, 24])
def test_every_line_of_the_table(depth: int) -> None:
    """Table 6, at twice the batch and with d0 = 16."""
    root = math.sqrt(2) * 4e-4
    for rules, rate, factor, decay in (
        (STANDARD, root, 1, 0.1),
        (MUP, root, 16 / depth, 0.1),
        (PLUS, root * math.sqrt(16 / depth), 16 / depth, 0.0),
    ):
        assert rules.peak_learning_rate(depth, 2**22) == pytest.approx(rate)
        assert rules.learning_rate_factor(Role.MATRIX, depth) == factor
        assert rules.weight_decay(Role.MATRIX) == 0.1
        for role in set(Role) - {Role.MATRIX}:
            assert rules.learning_rate_factor(role, depth) == 1
            assert rules.weight_decay(role) == decay
    scaled = {"logit_multiplier": 16 / depth, "attention_scale": math.sqrt(128) / 64}
    residual = {"residual_multiplier": pytest.approx((2 * depth) ** -0.5)}
    assert STANDARD.multipliers(depth, 64) == {"attention_scale": 1 / 8}
    assert MUP.multipliers(depth, 64) == scaled | {"residual_multiplier": 1}
    assert PLUS.multipliers(depth, 64) == scaled | residual


def test_another_base() -> None:
    """A run at the base itself has the tuned rate, whatever was published."""
    base = Base(learning_rate=3e-3, depth=8, batch_tokens=4096, tokens=10**7, parameters=10**6)
    for rules in RULES.values():
        assert rules.peak_learning_rate(8, base=base) == 3e-3
        assert rules.learning_rate_factor(Role.MATRIX, 8, base) == 1
    assert PLUS.peak_learning_rate(32, 1024, base) == pytest.approx(3e-3 / 4)
    assert PUBLISHED_BASE.parameters == nominal_parameters("transformer++", 16)


@pytest.mark.parametrize("name", presets.NAMES)
def test_weight_decay_by_name(name: str) -> None:
    """Under muP++ exactly the listed matrices decay; under SP all parameters are one group."""
    for depth, fields in ((8, {}), (8, {"tie_embeddings": False, "norm": "layer",
                                        "attention_bias": True})):  # fmt: skip
        config = presets.build(
            name, depth, vocab_size=64, num_heads=4, num_kv_heads=2, head_dim=8, hidden_size=32,
            **fields,
        )  # fmt: skip
        with torch.device("meta"):
            model = LanguageModel(config)
        matrices, others = expected_groups(config)
        groups = groups_of(model, optimizer_of(run_scale(depth, 10**9)))
        assert groups == {0.1: matrices, 0.0: others}
        every = optimizer_of(run_scale(depth, 10**9, parametrization=Parametrization.STANDARD))
        assert len(build_optimizer(model, every).param_groups) == 1
        assert groups_of(model, every) == {0.1: matrices | others}
        plain = build_optimizer(
            model, optimizer_of(run_scale(depth, 10**9, parametrization=Parametrization.MUP))
        )
        assert {(one["learning_rate_factor"], one["weight_decay"]) for one in plain.param_groups}\
            == {(2.0, 0.1), (1.0, 0.1)}  # fmt: skip


def spread_of(values: torch.Tensor) -> float:
    return values.float().std(correction=0).item()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scheme", InitScheme)
def test_first_weights_are_those_of_the_table(scheme: InitScheme, tied: bool) -> None:
    """The rule that is told of a role is what initialisation draws, in spread and in kind."""
    config = presets.build(
        "sambay", 8, vocab_size=256, num_heads=4, num_kv_heads=2, head_dim=16, hidden_size=64,
        tie_embeddings=tied,
    )  # fmt: skip
    model = LanguageModel(config)
    initialise(model, scheme)
    seen = set()
    for name, role in parameter_roles(model).items():
        values = model.get_parameter(name)
        into_residual = isinstance(model.get_submodule(name.rpartition(".")[0]), ResidualProjection)
        rule = first_weights(
            scheme, role, fan_in=values.shape[-1], depth=8, tied=tied, into_residual=into_residual
        )
        if rule is None:
            assert role in (Role.VECTOR, Role.SSM)
            continue
        seen.add((role, into_residual))
        assert spread_of(values) == pytest.approx(rule.spread, rel=0.05)
        if rule.text.startswith("U"):  # a uniform draw ends at sqrt(3) of its spread
            assert values.abs().max() <= rule.spread * math.sqrt(3) * (1 + 1e-6)
        elif rule.spread:
            assert values.abs().max() > rule.spread * 3
    assert len(seen) == (3 if tied else 4)


def test_the_exceptions_of_the_released_code() -> None:
    """Which matrices are divided, and what untied models begin with."""

    def spread(scheme: str, role: Role, tied: bool, into_residual: bool = False) -> float:
        rule = first_weights(
            InitScheme(scheme), role, fan_in=300, depth=8, tied=tied, into_residual=into_residual
        )
        assert rule is not None
        return rule.spread

    # Divided by sqrt(2 d) in every model but untied ones under muP ...
    for scheme, tied, divided in (
        ("standard", True, True), ("standard", False, True), ("mup_released", True, True),
        ("mup_released", False, False), ("mup_published", True, False),
        ("mup_published", False, False),
    ):  # fmt: skip
        plain = spread(scheme, Role.MATRIX, tied)
        assert plain == (0.02 if scheme == "standard" else 1 / 30)
        residual = spread(scheme, Role.MATRIX, tied, into_residual=True)
        assert residual == (plain / 4 if divided else plain)
    # ... on top of the residual multiplier, which models of muP++ have besides.
    assert PLUS.init_scheme is MUP.init_scheme is InitScheme.MUP_RELEASED
    assert PLUS.multipliers(8, 128)["residual_multiplier"] == 1 / 4
    # The head that is not the embedding: nothing under muP, and a tiny embedding everywhere.
    for scheme in InitScheme:
        assert spread(scheme, Role.EMBEDDING, tied=True) == 0.02
        assert spread(scheme, Role.EMBEDDING, tied=False) == 1e-4
        head = spread(scheme, Role.OUTPUT, tied=False)
        assert head == (0.02 if scheme is InitScheme.STANDARD else 0)


def test_what_the_standard_scheme_redraws() -> None:
    """All linear maps, those of the time step too; convolutions, A, D and lambdas never."""
    config = presets.build(
        "sambay+da", 8, vocab_size=64, num_heads=4, num_kv_heads=2, head_dim=8, hidden_size=64
    )
    models = {}
    for scheme in InitScheme:
        models[scheme] = LanguageModel(config)
        initialise(models[scheme], scheme)
    standard, _, released = (dict(models[scheme].named_parameters()) for scheme in InitScheme)
    roles = parameter_roles(models[InitScheme.STANDARD])
    for name, role in roles.items():
        same = torch.equal(standard[name], released[name])
        assert same == (role is not Role.MATRIX), name
    mixer = "blocks.0.mixer"
    for name in ("x_proj", "dt_proj"):
        assert spread_of(standard[f"{mixer}.{name}.weight"]) == pytest.approx(0.02, rel=0.05)
    assert spread_of(released[f"{mixer}.dt_proj.weight"]) == pytest.approx(12**-0.5, rel=0.05)
    assert standard[f"{mixer}.conv_weight"].abs().max().item() == pytest.approx(0.5, rel=0.02)
