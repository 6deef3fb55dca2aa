"""What `sambay scaling table` prints, against the published table and a search of its own."""

from __future__ import annotations

import pytest

from sambay.cli.main import main
from sambay.scaling.horizon import token_budget
from sambay.spec import presets
from sambay.spec.footprint import training_flops


def table(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[list[list[str]], list[str]]:
    """The cells of the Markdown table without its head, and the notes below."""
    assert main(["scaling", "table", *words, "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"
    ]
    return rows[2:], [line[2:] for line in lines if line.startswith("- ")]


def test_the_published_ladder(capsys: pytest.CaptureFixture[str]) -> None:
    rows, notes = table(capsys)
    found = {(row[0], row[1]): row[2:] for row in rows}
    assert len(found) == 4 * 5
    # arXiv 2507.06607, table 7, and exact counts of the released layer order.
    assert found["sambay", "16"] == [
        "1,984", "1,002.33 M", "1,065.82 M", "986.35 M", "+1.62%", "101.4 B", "2,097,152",
        "0.0004", "0.0004", "0, 0.1", found["sambay", "16"][10], "5.8385e+20",
    ]  # fmt: skip
    row_flops = training_flops(presets.build("sambay", 16), 4096)
    flops = row_flops / 4096 * token_budget("sambay", 16)
    assert float(found["sambay", "16"][10]) == pytest.approx(flops, rel=1e-3)
    assert found["samba+yoco", "8"][:6] == [
        "1,008", "128.81 M", "161.07 M", "123.15 M", "+4.60%", "12.7 B",
    ]  # fmt: skip
    assert found["transformer++", "24"][7:9] == ["0.000327", "0.000218"]
    for depth in ("12", "20"):
        assert set(found["sambay+da", depth]) == {"-"}
    failures = [note for note in notes if "cannot be built" in note]
    assert failures == [
        f"sambay+da at depth {depth} cannot be built: model.num_kv_heads = {heads} is odd; "
        "differential attention pairs heads, choose an even number"
        for depth, heads in ((12, 3), (20, 5))
    ]


def test_equal_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    """All architectures within 1 % of one count, and depths that none can have are listed."""
    rows, notes = table(
        capsys, "--exact", "--architectures", "all", "--depths", "8,10", "--base-aspect", "48",
        "head_dim=16", "num_heads=4", "num_kv_heads=2", "vocab_size=512", "d_state=16",
    )  # fmt: skip
    found = {row[0]: row for row in rows if row[1] == "8"}
    assert set(found) == set(presets.NAMES)
    for row in found.values():
        assert abs(float(row[6].rstrip("%"))) < 1
        assert row[5] == row[13] == "-"
    assert found["transformer++"][2] == "384"
    assert sum("depth = 10" in note for note in notes) == len(presets.NAMES)


def test_a_target_and_horizons(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--exact", "--architectures", "sambay", "--depths", "16", "--target", "4e9",
             "--with-embeddings", "--multiple", "64"]  # fmt: skip
    ((_, _, hidden, _, count, *_),), _ = table(capsys, *words)
    assert int(hidden.replace(",", "")) % 64 == 0
    assert float(count.rstrip(" M").replace(",", "")) == pytest.approx(4000, rel=0.02)
    rows = {
        horizon: table(capsys, *words, "--horizon", horizon)[0][0]
        for horizon in ("constant", "batch", "rate")
    }
    batch = int(rows["batch"][8].replace(",", ""))
    tokens = float(rows["batch"][7].rstrip(" B"))
    assert batch == pytest.approx(2**21 * (tokens / 100) ** 0.5, rel=1e-3)
    assert float(rows["batch"][9]) > float(rows["constant"][9]) > float(rows["rate"][9])
    assert float(rows["rate"][11].split()[1]) > 0.1


def test_plain_text_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", "table", "--depths", "8,24", "--architectures", "sambay"]) == 0
    head, first, second, *_ = capsys.readouterr().out.splitlines()
    for column in ("depth", "hidden", "FLOPs", "as published"):
        at = head.index(column)
        assert all(line[at - 1] == " " and line[at] != " " for line in (first, second))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parametrization", "mupp"], "parametrization 'mupp' does not exist (did you mean"),
        (["--architectures", "sambay,smbay"], "preset 'smbay' does not exist (did you mean"),
        (["--horizon", "far"], "--horizon = 'far'"),
        (["--depths", "eight"], "--depths = 'eight'"),
        (["--length", "0"], "--length = 0; it must be 1 or more"),
        (["--depths", "10"], "depth = 10; "),
        (["head_dims=3"], "'head_dims=3' is no field=value of a model (did you mean 'head_dim'?)"),
        (["head_dim=x"], "head_dim = 'x'"),
        (["--exact", "--multiple", "1"], "multiple = 1; hidden sizes are multiples of 2 or more"),
        (["--target", "1e6"], "--target has no effect without --exact"),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", "table", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}"), captured.err
    assert captured.out == ""
