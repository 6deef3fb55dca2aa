"""`sambay scaling fit`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sambay.cli.main import main
from sambay.cli.scaling.fit import _laws
from sambay.scaling.fit import NoiseSource
from sambay.scaling.fit_points import Resource, read_points
from sambay.scaling.published import published_studies

SIZES = (1e13, 6e13, 3e14, 2e15, 1e16)


def table(folder: Path) -> Path:
    lines = ["D,L,architecture,seed"]
    for name, A, wobble in (("sambay", 120.0, 3e-3), ("samba+yoco", 118.0, -2e-3)):
        for index, D in enumerate(SIZES):
            for seed in (0, 1) if index < 2 else (0,):
                shift = wobble * (-1) ** (index + seed)
                lines.append(f"{D},{A * D**-0.13 + 1.5 + shift},{name},{seed}")
    path = folder / "losses.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_writes_a_table_numbers_and_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["scaling", "fit", str(table(tmp_path)), "--compare", "sambay", "samba+yoco"]
    assert main([*words, "--at", "5e17", "--draws", "200", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "| sambay | 7 |" in printed
    assert "**sambay against samba+yoco**" in printed
    assert "At D = 5e+17, 50x the largest run" in printed
    assert "seeds differ by" in printed
    values = json.loads((out / "fits.json").read_text())
    assert [curve["name"] for curve in values["curves"]] == ["sambay", "samba+yoco"]
    assert len(values["curves"][0]["runs"]) == 7
    assert values["comparisons"][0]["is_paired"]
    assert printed.split("# Fits")[0].splitlines()[-1].startswith("written to")
    assert values["comparisons"][0]["verdict"][0] in (out / "fits.md").read_text()
    for name in ("fits", "fits_compared"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        svg = (out / f"{name}.svg").read_text()
        assert "<svg" in svg
        assert "Date" not in svg  # the same input gives the same picture


def test_noise_can_be_chosen(tmp_path: Path) -> None:
    points = list(read_points(table(tmp_path), Resource.FLOPS).points)
    own = _laws("auto", points)
    assert [law.noise.freedom for law in own] == [4, 4]
    known, pooled, seeds = (_laws(word, points) for word in ("0.002", "pooled", "seeds"))
    assert [law.noise.sigma for law in known] == [0.002, 0.002]
    assert [law.noise.freedom for law in pooled] == [8, 8]
    assert pooled[0].noise == pooled[1].noise
    assert [law.noise.source for law in seeds] == [NoiseSource.SEEDS] * 2
    assert [law.C for law in known] == [law.C for law in own]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--published", "TABLE"], "give one of a TABLE and --published"),
        ([], "give one of a TABLE and --published"),
        (["TABLE", "--level", "95"], "--level 95 is out of range"),
        (["TABLE", "--draws", "10"], "--draws 10 is too few"),
        (["TABLE", "--at", "-1"], "D must be a positive number"),
        (["TABLE", "--noise", "loud"], "--noise loud is unknown"),
        (["TABLE", "--noise", "-0.1"], "unknown; use auto"),
        (["TABLE", "--compare", "sambay", "mamba"], "no runs of 'mamba'"),
        (["TABLE", "--baseline", "mamba"], "no runs of 'mamba'"),
        (["TABLE", "--leave-out", "x"], "no run 'x' to leave out"),
        (["--published", "--at", "1e20"], "--at has no effect with --published"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(table(tmp_path))
    assert main(["scaling", "fit", *(path if word == "TABLE" else word for word in words)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_recorded_page_holds_the_published_constants() -> None:
    """The page of recorded fits shows a line for every curve and every constant of a legend."""
    page = Path(__file__).parents[2] / "docs" / "results" / "published_fits.md"
    text = page.read_text()
    for study in published_studies():
        for points in study.points:
            assert f"| {points.name} | {len(points.x)} |" in text
        for name, (A, b, C) in study.printed.items():
            assert f"| {name} | {A:.2f}, {b:.2f}, {C:.2f} |" in text
    assert "9.99e+21" in text


@pytest.mark.slow
def test_published_prints_every_study(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", "fit", "--published", "--draws", "200"]) == 0
    printed = capsys.readouterr().out
    assert "The constants of all 4 printed fits come out to the digits." in printed
    assert "The constants of all 7 printed fits come out to the digits." in printed
    assert "cross at D = 9.99e+21" in printed
