"""Sizes, tokens and learning rates as functions of depth, against the published table."""

from __future__ import annotations

import pytest

from sambay.errors import ConfigError
from sambay.scaling.horizon import (
    matrix_learning_rate_factor,
    nominal_parameters,
    peak_learning_rate,
    token_budget,
)
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
}


@pytest.mark.parametrize(("run", "published"), TABLE_7.items(), ids=str)
def test_the_ladder(run: tuple[str, int], published: tuple[float, ...]) -> None:
    architecture, depth = run
    width, layers, total, rate, tokens = published
    config = presets.build(architecture, depth)
    nominal = nominal_parameters(architecture, depth)
    assert config.hidden_size == width
    assert nominal / 1e6 == pytest.approx(layers, abs=0.1)
    assert (nominal + 32_000 * width) / 1e6 == pytest.approx(total, abs=0.1)
    assert peak_learning_rate(depth) == pytest.approx(rate, rel=2e-3)
    assert token_budget(architecture, depth) / 1e9 == pytest.approx(tokens, abs=0.051)
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


def test_rates_under_the_three_parametrizations() -> None:
    """arXiv 2507.06607, table 6: only muP++ goes down with depth, only SP has one rate for all."""
    standard, mup, plus = Parametrization
    assert [peak_learning_rate(4, parametrization=one) for one in (standard, mup, plus)] == [
        4e-4, 4e-4, 8e-4,
    ]  # fmt: skip
    assert [matrix_learning_rate_factor(8, one) for one in (standard, mup, plus)] == [1, 2, 2]
    # Matrix rates of muP++ at the published depths.
    matrix = {8: 1.131e-3, 12: 6.16e-4, 16: 4e-4, 20: 2.86e-4, 24: 2.18e-4}
    for depth, rate in matrix.items():
        product = peak_learning_rate(depth) * matrix_learning_rate_factor(depth)
        assert product == pytest.approx(rate, rel=2e-3)
    assert peak_learning_rate(16, 2**23) == pytest.approx(8e-4)  # with the root of the batch


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="did you mean 'sambay'"):
        token_budget("samby", 8)
    with pytest.raises(ConfigError, match="depth = 10"):
        token_budget("sambay", 10)
