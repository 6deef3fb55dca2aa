"""Learning-rate sweeps: planned, trained, resumed, judged; and the rate carries over in depth."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import sambay
from sambay.cli.main import main
from sambay.data.manifest import Manifest
from sambay.data.prepare import prepare
from sambay.data.settings import PrepareSettings
from sambay.errors import ConfigError
from sambay.recipes.small_ladder import small_ladder
from sambay.spec import Parametrization
from sambay.studies.ledger import Ledger
from sambay.studies.optimum import find_optimum, find_shift
from sambay.studies.results import DIVERGED
from sambay.studies.transfer import Build, Judged, SweepMember, collect, expand
from sambay.studies.transfer_report import page
from sambay.train.config import RunConfig
from sambay.train.display import Silence
from sambay.train.loop import train
from sambay.train.metrics import read_metrics
from sambay.train.resilience import TrainingDiverged
from tests.train.conftest import make_data

STANDARD, MUP, PLUS = Parametrization
FACTORS = (0.5, 1.0, 2.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("prepared"))


def words_for(data: Path) -> list[str]:
    """The small ladder, but two steps of 64 tokens."""
    return [
        "schedule.total_tokens=128", "schedule.warmup_tokens=0", "data.sequence_length=16",
        "batch.global_batch_size=4", "resilience.max_skips=0",
        "batch.micro_batch_size=4", f"data.directory={data}", "data.verify=false",
        f"model.vocab_size={Manifest.read(data).vocab_size}", "evaluation.max_tokens=64",
    ]  # fmt: skip


def builder(data: Path) -> Build:
    from sambay.cli.overrides import apply_overrides

    def build(parametrization: Parametrization, depth: int, seed: int) -> RunConfig:
        config = small_ladder("sambay", depth, seed, parametrization=parametrization)
        return apply_overrides(config, words_for(data))

    return build


def train_all(members: list[SweepMember], out: Path) -> list[SweepMember]:
    """Train in this process as the runner's workers do; those that diverged."""
    diverged = []
    for member in members:
        assert member.config is not None
        try:
            train(member.config, out / "runs" / member.name, display=Silence())
        except TrainingDiverged as error:
            ledger = Ledger(members, out)
            ledger.ends(member, DIVERGED, str(error))
            ledger.write()
            diverged.append(member)
    return diverged


def test_a_sweep_from_the_command_line_skips_what_is_done_and_records_what_diverged(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All runs are there before the command starts, so it trains none and only judges."""
    members = expand(builder(data), "sambay", [PLUS], [4, 8], [0.5, 1.0, 1e38], [1])
    assert train_all(members, tmp_path) == [one for one in members if one.factor == 1e38]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    words = ["scaling", "transfer", "sambay", *words_for(data), "--out", str(tmp_path)]
    code = main([*words, "--depths", "4,8", "--factors", "1,0.5,1e38"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    report = json.loads((tmp_path / "transfer.json").read_text())
    assert report["factors"] == [0.5, 1, 1e38]
    for depth, curve in zip((4, 8), report["curves"], strict=True):
        assert curve["states"] == ["finished", "finished", "diverged"]
        assert curve["losses"][2] is None
        assert curve["base_learning_rate"] == pytest.approx(1.6e-2 * math.sqrt(16 / depth))
        for factor, loss in zip(("0.5", "1"), curve["losses"], strict=False):
            lines = read_metrics(tmp_path / "runs" / f"mup++-d{depth}-x{factor}-s1")
            assert loss == lines[-1]["validation_loss"]
        best = curve["optimum"]
        assert best["loss"] == min(curve["losses"][:2])
        assert f"**{best['loss']:.4f}**" in printed
    assert report["shifts"]["mup++"]["verdict"] in printed
    assert (tmp_path / "transfer.png").exists()
    # The same runs judged by their training loss; two steps have one in their last tenth.
    assert main([*words, "--depths", "4,8", "--factors", "1,0.5,1e38", "--loss", "training"]) == 0
    curve = json.loads((tmp_path / "transfer.json").read_text())["curves"][0]
    lines = read_metrics(tmp_path / "runs" / "mup++-d4-x0.5-s1")
    assert curve["losses"][0] == lines[-1]["loss"]
    capsys.readouterr()
    # A run that is there under another configuration is not taken for this one.
    assert main([*words, "--depths", "4,8", "--factors", "1,0.5", "model.d_state=3"]) == 2
    assert "model.d_state = 3" in capsys.readouterr().err


def test_plan(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*words_for(data), "--out", str(tmp_path / "new"), "--dry-run"]
    options = ["--depths", "4,6,8", "--parametrizations", "standard,mup++", "--seeds", "1,2"]
    assert main(["scaling", "transfer", "small_ladder", *words, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 3 * 7 * 2
    assert sum("cannot be built: depth = 6" in line for line in lines) == 2 * 7 * 2
    rates = {line.split()[0]: float(line.split()[2]) for line in lines if " rate " in line}
    assert rates["mup++-d4-x8-s2"] == pytest.approx(8 * 1.6e-2 * 2)
    assert rates["standard-d4-x0.125-s1"] == rates["standard-d8-x0.125-s1"] == 2e-3
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["smal_ladder"], "did you mean 'small_ladder'"),
        (["demo_sambay"], "has no argument depth"),
        (["ladder", "--seeds", "1,2"], "has no argument seed"),
        (["sambay", "depth=8"], "use --depths"),
        (["sambay", "optimizer.peak_learning_rate=1"], "use --factors"),
        (["sambay", "--factors", "1"], "two or more positive numbers"),
        (["sambay", "--factors", "1,-2"], "two or more positive numbers"),
        (["sambay", "--factors", "1,2,1"], "each only once"),
        (["sambay", "--parametrizations", "mup+"], "did you mean 'mup"),
        (["sambay", "--depths", "0,4"], "--depths = 0"),
        (["sambay", "--depths", "6,10"], "no run of this sweep can be built; depth = 6"),
        (["sambay", "--loss", "test"], "--loss"),
        (["sambay", "data.directory=nowhere"], "nowhere"),
    ],
)
def test_mistakes(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scaling", "transfer", *words, "--out", str(tmp_path / "new")]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_a_recipe_that_ignores_its_depth_is_refused(data: Path) -> None:
    build = builder(data)
    with pytest.raises(ConfigError, match="the recipe gives 4 layers"):
        expand(lambda which, _, seed: build(which, 4, seed), "x", [PLUS], [4, 8], FACTORS, [1])


def test_optimum_by_grid_and_by_parabola() -> None:
    losses = {2.0**x: 3 + 0.5 * (x - 0.3) ** 2 for x in range(-3, 4)}
    best = find_optimum(losses)
    assert best is not None
    assert (best.factor, best.index, best.at_edge) == (1.0, 3, False)
    assert best.vertex == pytest.approx(2**0.3)
    uneven = find_optimum({x: 1 + (math.log2(x) - 0.5) ** 2 for x in (0.25, 1.0, 1.5, 4.0)})
    assert uneven is not None
    assert uneven.vertex == pytest.approx(2**0.5)
    edge = find_optimum({1.0: 2.0, 2.0: 3.0, 4.0: None})
    assert edge is not None
    assert edge.at_edge
    assert edge.vertex is None
    beside = find_optimum({0.5: 3.0, 1.0: 2.0, 2.0: math.nan})  # what lies beside it diverged
    assert beside is not None
    assert (beside.factor, beside.vertex) == (1.0, None)
    equal = find_optimum(dict.fromkeys(FACTORS, 2.0) | {0.5: 2.5, 2.0: 2.0})
    assert equal is not None
    assert equal.factor == 1.0
    assert find_optimum({1.0: None, 2.0: math.inf}) is None


def test_verdicts() -> None:
    grid = [2.0**x for x in range(-3, 4)]

    def at(place: float):
        return find_optimum({x: (math.log2(x) - place) ** 2 for x in grid})

    still = find_shift({8: at(0.2), 16: at(-0.2)}, grid)
    assert (still.by_grid, still.is_carried_over) == (0, True)
    assert still.by_parabola == pytest.approx(0.4)
    one = find_shift({8: at(1.1), 12: at(0.6), 16: at(0)}, grid)
    assert (one.by_grid, one.is_carried_over) == (1, True)
    two = find_shift({8: at(2), 16: at(0)}, grid)
    assert (two.by_grid, two.is_carried_over) == (2, False)
    assert "moves by 2 steps" in two.verdict
    edge = find_shift({8: at(3), 16: at(2)}, grid)
    assert not edge.is_carried_over
    assert "at depth 8" in edge.verdict
    assert "undecided" in find_shift({8: at(0), 16: None}, grid).verdict


def test_runs_that_are_not_done_are_no_results(data: Path, tmp_path: Path) -> None:
    members = expand(builder(data), "sambay", [PLUS], [4], [1.0, 2.0], [1, 2])
    rows = {one.name: {"state": "finished", "validation_loss": 3.0} for one in members}
    rows["mup++-d4-x2-s2"] = {"state": "pending", "validation_loss": None}
    result = collect(members, rows, tmp_path)
    (curve,) = result.curves
    assert curve.losses == {1.0: 3.0, 2.0: None}
    assert curve.states == {2.0: "pending"}
    assert any("pending" in line and "**3.0000**" in line for line in page(result))
    assert result.judged is Judged.VALIDATION


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_best_rate_stays_within_one_step_over_three_depths(tmp_path: Path) -> None:
    """Depths 8, 12 and 16 on this project's own text: its code and its pages."""
    root = Path(sambay.__file__).parent
    settings = PrepareSettings(vocab_size=512, validation_fraction=0.05)
    prepare([root], tmp_path / "data", settings, workers=1)

    def build(parametrization: Parametrization, depth: int, seed: int) -> RunConfig:
        from sambay.cli.overrides import apply_overrides

        tokens = 160 * 16 * 128  # with 64 steps the best of neighbouring rates is chance
        config = small_ladder("sambay", depth, seed, tokens, parametrization=parametrization)
        changes = ["threads=1", "evaluation.every_steps=1000", "evaluation.max_tokens=16384"]
        return apply_overrides(config, [f"data.directory={tmp_path / 'data'}", *changes])

    factors = [0.25, 0.5, 1.0, 2.0]
    members = expand(build, "sambay", [PLUS], [8, 12, 16], factors, [1])
    assert train_all(members, tmp_path) == []
    result = collect(members, Ledger(members, tmp_path).write(), tmp_path)
    assert result.shifts[PLUS].is_carried_over, "\n".join(page(result))
