"""The table by role of `sambay train --dry-run`: all parameters, once, and what becomes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sambay.recipes.published import ladder, scaling_run
from sambay.recipes.small import sambay_20m
from sambay.spec import InitScheme, Parametrization, presets
from sambay.spec.footprint import parameter_count
from sambay.train.config import RunConfig
from sambay.train.roles_table import roles_table

COLUMNS = ("role", "tensors", "parameters", "begins as", "spread", "peak rate", "decay", "what")


def cells(config: RunConfig) -> tuple[str, list[dict[str, str]], str]:
    """The line above the table, its rows by the name of the column, and the line below it."""
    title, head, *rows, multipliers = roles_table(config)
    starts = [head.index(column) for column in COLUMNS]
    ends = [*starts[1:], None]
    return (
        title,
        [
            {
                name: row[start:end].strip()
                for name, start, end in zip(COLUMNS, starts, ends, strict=True)
            }
            for row in rows
        ],
        multipliers.strip(),
    )


@pytest.mark.parametrize("name", presets.NAMES)
def test_every_parameter_is_in_one_row(name: str) -> None:
    config = ladder(name, 8)
    _, rows, _ = cells(config)
    total = sum(int(row["parameters"].replace(",", "")) for row in rows)
    assert total == parameter_count(config.model)


def test_what_it_says_of_a_published_run() -> None:
    title, rows, multipliers = cells(ladder("sambay+da", 8))
    assert title == "by role of parameter (the rules of mup++):"
    assert multipliers == "multipliers: residual 0.25, logits 2, attention 0.08839, embedding 1"
    plain, residual = (row for row in rows if row["role"] == "matrix")
    for row in (plain, residual):
        assert (row["peak rate"], row["decay"]) == ("0.001131", "0.1")
    assert plain["begins as"] == "U(+-1/sqrt(fan in))"
    # Of fan-ins from the time step's 62 to the inner 1984.
    assert [float(one) for one in plain["spread"].split(" to ")] == pytest.approx(
        [(3 * 1984) ** -0.5, (3 * 62) ** -0.5], rel=0.01
    )
    assert residual["begins as"] == "U(+-1/sqrt(fan in)) / sqrt(2 x 8)"
    assert residual["what"] == "into the residual stream"
    assert residual["tensors"] == "16"  # of 8 mixers and 8 MLPs
    others = [row for row in rows if row["role"] != "matrix"]
    assert {row["role"] for row in others} == {"vector", "embedding", "ssm"}
    assert {(row["peak rate"], row["decay"]) for row in others} == {("0.0005657", "0")}
    by_name = {row["what"]: row for row in others}
    assert by_name["A_log"]["begins as"] == "drawn by Mamba"
    assert (by_name["D"]["begins as"], by_name["D"]["spread"]) == ("1", "0")
    lambdas = by_name["lambda_q1, lambda_k1, lambda_q2, lambda_k2"]
    assert float(lambdas["spread"]) == pytest.approx(0.1, rel=0.2)


def test_other_rules() -> None:
    title, rows, _ = cells(ladder("transformer++", 8, Parametrization.STANDARD))
    assert title.endswith("(the rules of standard):")
    assert {(row["peak rate"], row["decay"]) for row in rows} == {("0.0004", "0.1")}
    assert {row["begins as"] for row in rows if row["role"] == "matrix"} == {
        "N(0, 0.02)", "N(0, 0.02) / sqrt(2 x 8)",
    }  # fmt: skip
    title, _, _ = cells(ladder("transformer++", 8, Parametrization.MUP))
    assert title.endswith("(the rules of mup):")
    title, _, _ = cells(sambay_20m())  # multipliers of muP++, but one rate for all
    assert title.endswith("(the rules of none of standard, mup, mup++):")


def test_untied_models() -> None:
    config = scaling_run("sambay", 8, 10**10, tie_embeddings=False)
    _, rows, _ = cells(config)
    by_role = {row["role"]: row for row in rows}
    assert (by_role["output"]["begins as"], by_role["output"]["spread"]) == ("0", "0")
    assert by_role["embedding"]["begins as"] == "N(0, 0.0001)"
    assert float(by_role["embedding"]["spread"]) == pytest.approx(1e-4, rel=0.03)
    _, rows, _ = cells(replace(config, init_scheme=InitScheme.STANDARD))
    assert [row["begins as"] for row in rows if row["role"] == "output"] == ["N(0, 0.02)"]


def test_the_table_in_the_document() -> None:
    """Shown is what the command beside it prints."""
    document = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    assert "\n".join(roles_table(ladder("sambay+da", 8))) in document
