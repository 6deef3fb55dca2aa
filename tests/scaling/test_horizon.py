"""Sizes, tokens and learning rates as functions of depth, against the published table."""

from __future__ import annotations

import pytest

from sambay.errors import ConfigError
from sambay.scaling.horizon import (
    Horizon,
    published_flops,
    run_scale,
    token_budget,
    tokens_for,
)
from sambay.scaling.iso import nominal_parameters
from sambay.scaling.rules import Base
from sambay.spec import Parametrization, presets
from sambay.spec.footprint import parameter_count

# arXiv 2507.06607, table 7: depth -> width, parameters without embeddings and in all (millions),
# learning rate, tokens (billions).
TABLE_7 = {
    ("transformer++", 8): (1024, 121.6, 154.4, 5.66e-4, 12.5),
    ("transformer++", 12): (1536, 410.5, 459.7, 4.62e-4, 42.2),
    ("transformer++", 16): (2048, 973.1, 1038.6, 4.00e-4, 100.0),
    ("transformer++", 20): (2560, 1900.5, 1982.5, 3.58e-4, 195.3),
    ("transformer++", 24): (3072, 3284.1, 3382.4, 3.27e-4, 337.5),
    ("sambay", 8): (992, 123.3, 155.0, 5.66e-4, 12.7),
    ("sambay", 12): (1488, 416.1, 463.7, 4.62e-4, 42.8),
    ("sambay", 16): (1984, 986.3, 1049.8, 4.00e-4, 101.4),
    ("sambay", 20): (2480, 1926.5, 2005.8, 3.58e-4, 198.0),
    ("sambay", 24): (2976, 3328.9, 3424.2, 3.27e-4, 342.1),
    ("samba+yoco", 8): (1008, 123.2, 155.4, 5.66e-4, 12.7),
    ("samba+yoco", 12): (1512, 415.6, 464.0, 4.62e-4, 42.7),
    ("samba+yoco", 16): (2016, 985.2, 1049.7, 4.00e-4, 101.2),
    ("samba+yoco", 20): (2520, 1924.3, 2004.9, 3.58e-4, 197.8),
    ("samba+yoco", 24): (3024, 3325.1, 3421.9, 3.27e-4, 341.7),
}
# The same table, models of the ablations at depth 16: width, parameters.
ABLATIONS = {
    "swa+yoco": (2080, 984.0, 1050.6),
    "mambay": (1920, 975.2, 1036.6),
    "sambay-a": (2016, 985.2, 1049.7),
    "sambay-aa": (2016, 985.2, 1049.7),
    "sambay-mlp": (1920, 985.0, 1046.4),
    "sambay-2": (1984, 986.3, 1049.8),
    "mambay-2": (1920, 975.2, 1036.6),
    "gdny": (1920, 960.4, 1021.9),
    "s-gdny": (2016, 1001.0, 1065.5),
}
# The FLOPs at which the losses of a depth are plotted, for every architecture (figure 2a).
FLOPS = {8: 9.1226e18, 12: 1.03912e20, 16: 5.83847e20, 20: 2.22720e21, 24: 6.65038e21}


@pytest.mark.parametrize(("run", "published"), TABLE_7.items(), ids=str)
def test_the_ladder(run: tuple[str, int], published: tuple[float, ...]) -> None:
    architecture, depth = run
    width, layers, total, rate, tokens = published
    config = presets.build(architecture, depth)
    nominal = nominal_parameters(architecture, depth)
    assert config.hidden_size == width
    assert nominal / 1e6 == pytest.approx(layers, abs=0.1)
    assert (nominal + 32_000 * width) / 1e6 == pytest.approx(total, abs=0.1)
    budget = token_budget(architecture, depth)
    assert budget / 1e9 == pytest.approx(tokens, abs=0.051)
    assert run_scale(depth, budget).peak_learning_rate == pytest.approx(rate, rel=2e-3)
    assert 100 < token_budget(architecture, depth) / nominal < 105


@pytest.mark.parametrize(("name", "published"), ABLATIONS.items())
def test_the_ablations(name: str, published: tuple[float, ...]) -> None:
    width, layers, total = published
    assert presets.build(name, 16).hidden_size == width
    assert nominal_parameters(name, 16) / 1e6 == pytest.approx(layers, abs=0.1)
    assert (nominal_parameters(name, 16) + 32_000 * width) / 1e6 == pytest.approx(total, abs=0.1)


@pytest.mark.parametrize("name", presets.NAMES)
def test_the_formula_is_close_to_the_exact_count(name: str) -> None:
    """Every preset has a formula, and it is the published approximation of that preset."""
    exact = parameter_count(presets.build(name, 8), embeddings=False)
    assert 0.99 < exact / nominal_parameters(name, 8) < 1.05


@pytest.mark.parametrize("depth", FLOPS)
def test_flops_of_the_figure(depth: int) -> None:
    assert published_flops(depth) == pytest.approx(FLOPS[depth], rel=1e-5)


def test_rates_under_the_three_parametrizations() -> None:
    """arXiv 2507.06607, table 6: only muP++ goes down with depth, only SP has one rate for all."""
    for one, rate, factor, decay in zip(
        Parametrization, (4e-4, 4e-4, 8e-4), (1, 4, 4), (0.1, 0.1, 0), strict=True
    ):
        scale = run_scale(4, 10**9, parametrization=one)
        assert scale.peak_learning_rate == rate
        assert scale.matrix_learning_rate_factor == factor
        assert (scale.weight_decay, scale.vector_weight_decay) == (0.1, decay)
        assert (scale.tokens, scale.batch_tokens) == (10**9, 2**21)


def test_a_batch_that_grows() -> None:
    """With the root of the tokens, in whole rows, and the rate with the root of the real batch."""
    scale = run_scale(16, 400_000_000_000, horizon=Horizon.BATCH)
    assert scale.batch_tokens == 2**22
    assert scale.peak_learning_rate == pytest.approx(4e-4 * 2**0.5)
    scale = run_scale(16, 200_000_000_000, horizon=Horizon.BATCH, batch_multiple=4 * 4096)
    assert scale.batch_tokens == 724 * 4096  # 724.08 rows
    assert scale.peak_learning_rate == pytest.approx(4e-4 * (724 / 512) ** 0.5)
    assert run_scale(16, 10, horizon=Horizon.BATCH, batch_multiple=4096).batch_tokens == 4096
    assert run_scale(16, 10**11, horizon=Horizon.BATCH) == run_scale(16, 10**11)


def test_a_rate_that_falls() -> None:
    """With the third root of the tokens; what a step decays stays."""
    plain = run_scale(16, 800_000_000_000)
    scale = run_scale(16, 800_000_000_000, horizon=Horizon.RATE)
    assert scale.batch_tokens == plain.batch_tokens == 2**21
    assert scale.peak_learning_rate == pytest.approx(2e-4)
    assert scale.weight_decay == pytest.approx(0.2)
    assert scale.vector_weight_decay == 0
    for depth in (8, 24):  # also where depth has changed the rate
        scale = run_scale(depth, 3 * 10**11, horizon=Horizon.RATE)
        assert scale.weight_decay * scale.peak_learning_rate == pytest.approx(0.1 * 4e-4)


def test_horizons_from_another_base() -> None:
    """A run like its base is the base, under each horizon; tokens go with the parameters."""
    base = Base(learning_rate=2e-3, depth=8, batch_tokens=8192, tokens=10**7, parameters=10**6)
    for horizon in Horizon:
        scale = run_scale(8, 10**7, horizon=horizon, base=base)
        assert (scale.batch_tokens, scale.peak_learning_rate) == (8192, 2e-3)
        assert (scale.weight_decay, scale.matrix_learning_rate_factor) == (0.1, 1)
    assert tokens_for(2_500_000, base) == 25_000_000


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="did you mean 'sambay'"):
        token_budget("samby", 8)
    with pytest.raises(ConfigError, match="depth = 10"):
        token_budget("sambay", 10)
    with pytest.raises(ConfigError, match="tokens = 0; it must be 1 or more"):
        run_scale(8, 0)
