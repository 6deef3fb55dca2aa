"""What `sambay train --dry-run` says about the published runs, on any number of devices."""

from __future__ import annotations

import pytest

from sambay.cli.main import main


def dry_run(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """The lines it prints before it finds that the data is not here."""
    assert main(["train", *words, "data.directory=nowhere", "--dry-run"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: nowhere has no manifest.json"), captured.err
    return captured.out.splitlines()


def line(lines: list[str], start: str) -> str:
    (found,) = (one for one in lines if one.strip().startswith(start))
    return found


def test_phi4_mini_flash(capsys: pytest.CaptureFixture[str]) -> None:
    lines = dry_run(capsys, "phi4_mini_flash", "parallel.replicate=128", "parallel.shard=8")
    for start, text in (
        ("parameters", "3,852,562,944 (3,340,399,104 without embeddings)"),
        ("batch", "1024 x 8192 = 8,388,608 tokens per step"),
        ("length", "596,046 steps"),
        ("learning rate", "0.0005 at its peak for matrices, 0.0005 for all others"),
        ("optimiser", "weight decay 0.1 of matrices and 0.1 of all others, first weights standard"),
        ("loss", "label smoothing 0.1, attention dropout 0.05: self-decoder from step 310,000, "
                 "cross-decoder from step 520,000"),
        ("disk", "every 10000-th step's for good"),
        ("1,024", "128 x 8 x 1"),
        ("64", "not possible: parallel: replicate=128 shard=8 tensor=1 do not multiply to the 64"),
        ("layout:", "an assumption (30% of an A100's 312 TFLOP/s in bf16"),
    ):  # fmt: skip
        assert text in line(lines, start)


def test_rates_by_role(capsys: pytest.CaptureFixture[str]) -> None:
    lines = dry_run(capsys, "ladder", "depth=8")
    rates = line(lines, "learning rate")
    assert "0.001131 at its peak for matrices, 0.0005657 for all others (embeddings" in rates
    assert "weight decay 0.1 of matrices and 0 of all others" in line(lines, "optimiser")


def test_devices_and_speed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["ladder", "depth=8", "--devices", "2,4", "--flops", "1e14"]
    lines = dry_run(capsys, *words)
    first, second = line(lines, "2 "), line(lines, "4 ")
    assert "1 x 2 x 1" in first
    assert float(first.split()[-1]) == pytest.approx(2 * float(second.split()[-1]), rel=0.01)
    assert "100 TFLOP/s of useful work per device, as stated" in line(lines, "layout:")
    faster = dry_run(capsys, *words[:-1], "2e14")
    assert float(first.split()[-1]) == pytest.approx(
        2 * float(line(faster, "2 ").split()[-1]), rel=0.01
    )
    share = dry_run(capsys, "ladder", "logging.peak_flops=1e15")
    assert "at 300 TFLOP/s" in line(share, "layout:")
    assert "30% of logging.peak_flops" in line(share, "layout:")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--devices", "x"], "--devices = 'x'; it must be a whole number"),
        (["--devices", "8,0"], "--devices = 8,0; each must be 1 or more"),
        (["--flops", "fast"], "--flops = 'fast'; it must be a number"),
        (["--flops", "-1e12"], "--flops = -1e+12; it must be greater than 0"),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"{words[0]}={words[1]}"]
    assert main(["train", "sambay_1b", "--dry-run", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert captured.out == ""
