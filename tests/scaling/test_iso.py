"""Widths of equally large models: the published roots, and a search over exact counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sambay.errors import ConfigError
from sambay.scaling.iso import (
    EXCEPTIONS,
    UNITS,
    aspect_ratio,
    coefficients,
    nearest_size,
    nominal_parameters,
    same_size,
)
from sambay.spec import ModelConfig, presets
from sambay.spec.footprint import parameter_count

# arXiv 2507.06607, section 3.1 and appendix C, with the equations of its text worked out:
# c2, c1, root, rounded up to even, published, millions of parameters at depth 16.
RATIOS = {
    "transformer++": (12, 320, 128.00, 128, 128, 973.1),
    "transformer-ls": (12, 320, 128.00, 128, 128, 973.1),
    "samba": (15, 160, 120.63, 122, 122, 994.4),
    "samba+yoco": (13.5, 208, 125.18, 126, 126, 985.2),
    "swa+yoco": (12, 288, 129.21, 130, 130, 984.0),
    "sambay": (14.5, 144, 123.13, 124, 124, 986.3),
    "sambay+da": (14.5, 144, 123.13, 124, 124, 986.3),
    "sambay-2": (14.5, 144, 123.13, 124, 124, 986.3),
    "mambay": (16, 64, 119.87, 120, 120, 975.2),
    "mambay-2": (16, 64, 119.87, 120, 120, 975.2),
    "sambay-mlp": (15.5, 144, 119.24, 120, 120, 985.0),
    "sambay-a": (13.5, 208, 125.18, 126, 126, 985.2),
    "sambay-aa": (13.5, 208, 125.18, 126, 126, 985.2),
    "gdny": (15.75, 64, 120.80, 122, 120, 960.4),
    "s-gdny": (14.25, 144, 124.16, 126, 126, 1001.0),
}
# The ablations of the norm's place have the sizes of what they ablate.
ABLATED = {"sambay-2+nb": "sambay-2", "mambay-2+nb": "mambay-2", "s-gdny+gdn": "s-gdny",
           "gdny+gdn": "gdny"}  # fmt: skip
ROWS = RATIOS | {name: RATIOS[base] for name, base in ABLATED.items()}
TINY: dict[str, Any] = {
    "num_heads": lambda depth: depth // 2,
    "num_kv_heads": lambda depth: depth // 4,
    "head_dim": 12,
    "vocab_size": 515,
}
# Of the recurrent layers, so that heads are small as well.
SMALL_STATE = {"mamba2": {"d_state": 8, "recurrent_head_dim": 4}, "gated_delta": {"d_state": 8}}


def tiny_fields(name: str) -> dict[str, Any]:
    kind = str(presets.PRESETS[name].fields.get("recurrent_kind", "mamba"))
    return TINY | SMALL_STATE.get(kind, {})


def test_every_preset_is_here() -> None:
    assert set(ROWS) == set(UNITS) == set(presets.NAMES)


@pytest.mark.parametrize(("name", "row"), ROWS.items())
def test_published_ratios(name: str, row: tuple[float, ...]) -> None:
    c2, c1, root, rounded, published, millions = row
    found = aspect_ratio(name)
    assert (found.c2, found.c1) == (c2, c1)
    assert found.root == pytest.approx(root, abs=0.0051)
    assert (found.rounded, found.published) == (rounded, published)
    assert found.rounded == published or EXCEPTIONS[name] == published
    # 994.44 is printed as 994.4, 986.35 as 986.3: some of the paper's are cut, not rounded.
    assert millions - 0.051 < nominal_parameters(name, 16) / 1e6 < millions + 0.1
    assert found.rounded - 2 < found.root <= found.rounded


def test_the_equation_is_the_count() -> None:
    """(c2 a^2 + c1 a) d^3 with the published ratio, at any depth; the target is 237,568 d^3."""
    for name, depth in (("sambay", 8), ("s-gdny", 12), ("swa+yoco", 24)):
        found = aspect_ratio(name)
        polynomial = found.c2 * found.published**2 + found.c1 * found.published
        assert nominal_parameters(name, depth) == polynomial * depth**3
    assert nominal_parameters("transformer++", 16) == 237_568 * 16**3
    assert coefficients("sambay-aa")[1] * 128 == 208


def test_other_bases() -> None:
    """A root that is an even number is not rounded; smaller heads make room for wider layers."""
    for base in (8, 24, 100):
        for head_dim in (8, 128):
            found = aspect_ratio("transformer++", base, head_dim)
            assert found.rounded == base
            assert found.root == pytest.approx(base)
    assert aspect_ratio("sambay", 16, 16).root < aspect_ratio("sambay", 16, 128).root
    with pytest.raises(ConfigError, match="base = 0"):
        aspect_ratio("sambay", 0)


@pytest.mark.parametrize("name", presets.NAMES)
@pytest.mark.parametrize("embeddings", [False, True])
def test_exact_search_against_trying_every_width(name: str, embeddings: bool) -> None:
    fields = tiny_fields(name)
    size = same_size(name, 8, base_aspect_ratio=7, multiple=4, embeddings=embeddings, **fields)
    values = {key: value(8) if callable(value) else value for key, value in fields.items()}
    counts = {
        width: parameter_count(presets.build(name, 8, hidden_size=width, **values),
                               embeddings=embeddings)
        for width in range(4, 100, 4)
    }  # fmt: skip
    best = min(counts, key=lambda width: abs(counts[width] - size.target))
    assert (size.hidden_size, size.parameters) == (best, counts[best])
    assert size.deviation == counts[best] / size.target - 1
    assert (size.config.num_heads, size.config.num_kv_heads, size.config.head_dim) == (4, 2, 12)
    reference = same_size("transformer++", 8, base_aspect_ratio=7, embeddings=embeddings, **TINY)
    assert (reference.hidden_size, reference.deviation) == (56, 0)
    assert reference.parameters == size.target


def test_published_sizes_are_larger_than_equal_ones() -> None:
    size = same_size("sambay", 16)
    assert size.target == parameter_count(presets.build("transformer++", 16), embeddings=False)
    assert size.hidden_size == 1954 < presets.build("sambay", 16).hidden_size
    assert abs(size.deviation) < 1e-3
    assert size.config == presets.build("sambay", 16, hidden_size=1954)


def test_a_target() -> None:
    size = same_size("mambay", 8, target=3_000_000, multiple=16, embeddings=True, vocab_size=4096)
    assert size.target == 3_000_000
    assert size.hidden_size % 16 == 0

    def build(width: int) -> ModelConfig:
        return presets.build("mambay", 8, hidden_size=width, vocab_size=4096)

    for other in (size.hidden_size - 16, size.hidden_size + 16):
        count = parameter_count(build(other))
        assert abs(count - 3_000_000) > abs(size.parameters - 3_000_000)
    exact = nearest_size(build, size.parameters, embeddings=True)
    assert (exact.hidden_size, exact.deviation) == (size.hidden_size, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sambay+da", 12), "num_kv_heads = 3 is odd; differential attention pairs heads"),
        (("sambay", 10), "depth = 10; 'sambay' repeats groups of four layers"),
        (("sambey", 8), "did you mean 'sambay'"),
    ],
)
def test_what_cannot_be_built(arguments: tuple[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        same_size(*arguments)
    with pytest.raises(ConfigError, match=message):
        nominal_parameters(*arguments)


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="100 parameters are fewer than the smallest model has"):
        same_size("sambay", 8, target=100)
    with pytest.raises(ConfigError, match="multiple = 0"):
        same_size("sambay", 8, multiple=0)
    with pytest.raises(ConfigError, match="hidden_size is what is looked for"):
        same_size("sambay", 8, hidden_size=64)


DOCUMENT = Path(__file__).parents[2] / "docs" / "scaling.md"


def test_the_table_of_the_document() -> None:
    lines = DOCUMENT.read_text().splitlines()
    rows = {}
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 11 and cells[0].strip("`") in UNITS:
            rows[cells[0].strip("`")] = cells[1:]
    assert list(rows) == list(UNITS)
    for name, cells in rows.items():
        ratio, size = aspect_ratio(name), same_size(name, 16)
        nominal = nominal_parameters(name, 16)
        exact = parameter_count(presets.build(name, 16), embeddings=False)
        assert cells == [
            UNITS[name], f"{ratio.c2:g}", f"{ratio.c1:g}", f"{ratio.root:.2f}",
            str(ratio.rounded), str(ratio.published), f"{nominal / 1e6:,.1f}",
            f"{exact / nominal - 1:+.2%}", f"{size.hidden_size:,}", f"{size.deviation:+.2%}",
        ]  # fmt: skip
