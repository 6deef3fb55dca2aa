"""Generation under load: what is asked, what is counted, and what ratios and intervals say."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from sambay.cli.main import main
from sambay.errors import ConfigError
from sambay.generate.memory import NotEnoughMemory
from sambay.model import LanguageModel
from sambay.ops.native.library import why_unavailable
from sambay.spec import presets
from sambay.studies.generation import GenerationPlan, Key, Lengths, measure
from sambay.studies.generation_report import Measured, interval, markdown, summarise
from sambay.studies.generation_run import PointsFile, require_memory_for

TINY = {"vocab_size": 64, "hidden_size": 32, "head_dim": 8, "num_heads": 4, "num_kv_heads": 2}


def plan_of(**fields: Any) -> GenerationPlan:
    settings: dict[str, Any] = {
        "models": ("a", "b"), "lengths": (Lengths(8, 12),), "concurrencies": (1, 3), "rounds": 2,
    }  # fmt: skip
    return GenerationPlan(**(settings | fields))


def test_lengths_are_normal_and_the_same_for_every_model() -> None:
    plan = plan_of(requests=400)
    pairs = plan.pairs(Lengths(2000, 32_000), 3, 0)
    assert len(pairs) == 1200
    for place, mean in enumerate((2000, 32_000)):
        drawn = [pair[place] for pair in pairs]
        average = sum(drawn) / len(drawn)
        deviation = (sum((value - average) ** 2 for value in drawn) / len(drawn)) ** 0.5
        assert average == pytest.approx(mean, rel=0.03)
        assert deviation / mean == pytest.approx(0.27, abs=0.03)  # 0.3 without what is cut off
        assert min(drawn) >= 0.4 * mean - 1
        assert max(drawn) <= 1.6 * mean + 1
    assert pairs == plan.pairs(Lengths(2000, 32_000), 3, 0)
    assert pairs != plan.pairs(Lengths(2000, 32_000), 3, 1)
    longest = max(p + n - 1 for t in (0, 1) for p, n in plan.pairs(Lengths(8, 12), 3, t))
    assert plan.capacity(Lengths(8, 12), 3) == longest


def test_models_take_turns_in_every_round() -> None:
    keys = list(plan_of().keys)
    assert [key.model for key in keys] == ["a", "b"] * 4
    assert [key.turn for key in keys] == [0] * 4 + [1] * 4
    assert [key.concurrency for key in keys[:4]] == [1, 1, 3, 3]


def test_a_measurement_counts_tokens_and_waits_only_for_its_own() -> None:
    """With a clock that ticks at every look, times are numbers of looks."""
    plan = plan_of(spread=0.0, concurrencies=(2,), requests=3)
    model = LanguageModel(presets.build("sambay", 4, window=5, **TINY))
    ticks, told = itertools.count(), []
    key = Key("a", "8/12", 2, 0)
    point = measure(model, plan, key, clock=lambda: float(next(ticks)), advance=told.append)
    assert point["requests"] == 6
    assert point["generated_tokens"] == sum(told) == 6 * 12
    assert point["tokens_per_second"] == 72 / point["seconds"]
    assert len(point["latencies"]) == 6
    # Twelve tokens are eleven steps, the first of which is a prefill with the first decode.
    assert all(10 <= latency <= 15 for latency in point["latencies"])
    assert [len(seconds) for seconds in point["reached"].values()] == [6] * len(point["reached"])
    assert list(point["reached"]) == ["1", "2", "3", "6", "12"]
    assert point["reached"]["12"] == point["latencies"]
    assert point["cache_bytes"] > 0
    assert point["step_mode"].startswith(("captured", "plain"))


def made_up(plan: GenerationPlan, rates: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Points whose latency is concurrency over throughput, as with clients that never pause."""
    points = []
    for key in plan.keys:
        rate = rates[key.model][plan.concurrencies.index(key.concurrency)] * (1 + 0.1 * key.turn)
        seconds = [120 * key.concurrency / rate] * 2
        reached = {"6": [s / 2 for s in seconds], "12": seconds}
        points.append({
            "model": key.model, "lengths": key.lengths, "concurrency": key.concurrency,
            "turn": key.turn, "tokens_per_second": rate, "latencies": seconds, "reached": reached,
            "cache_bytes": 10**6, "peak_bytes": None,
        })  # fmt: skip
    return points


def test_ratios_at_equal_concurrency_and_equal_latency() -> None:
    plan = plan_of(concurrencies=(1, 2, 4))
    rates = {"a": [20.0, 30.0, 48.0], "b": [10.0, 12.0, 16.0]}
    summary = summarise(Measured(plan, made_up(plan, rates)), "b")
    found = summary["lengths"]["8/12"]
    fast, slow = found["a"]["points"], found["b"]["points"]
    assert [point["equal_concurrency"] for point in fast] == pytest.approx([2.0, 2.5, 3.0])
    # Latencies of a: 6, 8, 10 seconds (over 1.049); of b: 12, 20, 30. At 12 a has its best.
    assert fast[0]["equal_latency"] == pytest.approx(4.8)
    assert fast[0]["equal_latency_is_bound"]
    assert [point["equal_latency"] for point in slow] == pytest.approx([1.0, 1.0, 1.0])
    assert not slow[0]["equal_latency_is_bound"]
    against_fast = summarise(Measured(plan, made_up(plan, rates)), "a")
    slow = against_fast["lengths"]["8/12"]["b"]["points"]
    assert [point["equal_latency"] for point in slow] == [None] * 3
    assert found["a"]["seconds_to_tokens"][12] == 2 * found["a"]["seconds_to_tokens"][6]
    assert fast[0]["equal_concurrency_interval"] == pytest.approx([2.0, 2.0])
    page = markdown(summary, ["about"])
    assert "| a | 1 | 20.98 |" not in page
    assert "| a | 1 | 21.0 | 5.72 | 2.00 [2.00, 2.00] | ≥ 4.80 [4.80, 4.80] | 1.0 |" in page


def test_between_points_the_curve_is_straight() -> None:
    plan = plan_of(concurrencies=(1, 4), rounds=1)
    rates = {"a": [20.0, 40.0], "b": [120 / 9.0, 14.0]}  # a at 6 and 12 seconds, b at 9
    point = summarise(Measured(plan, made_up(plan, rates)), "b")["lengths"]["8/12"]["a"]["points"]
    assert point[0]["equal_latency"] == pytest.approx(30 / (120 / 9.0))
    assert not point[0]["equal_latency_is_bound"]
    assert point[0]["equal_latency_interval"] is None


def test_intervals_are_those_of_resampled_rounds() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    ends = interval(range(8), lambda rounds: sum(values[r] for r in rounds) / len(rounds))
    assert ends is not None
    # The standard error of the mean is 2.29 / sqrt(8) = 0.81.
    assert ends == pytest.approx([4.5 - 1.59, 4.5 + 1.59], abs=0.25)
    assert interval([0], lambda rounds: 1.0) is None
    assert interval([0, 1], lambda rounds: None) is None


def test_only_whole_rounds_count() -> None:
    plan = plan_of()
    points = made_up(plan, {"a": [1.0, 2.0], "b": [1.0, 2.0]})
    assert Measured(plan, points[:-1]).rounds == [0]


def test_measurements_survive_a_killed_start(tmp_path: Path) -> None:
    plan, configs = plan_of(), {"a": presets.build("sambay", 4, **TINY)}
    file = PointsFile(tmp_path, plan, configs)
    keys = list(plan.keys)
    point = made_up(plan, {"a": [1.0, 2.0], "b": [1.0, 2.0]})[0]
    file.append(point)
    with file.path.open("a") as half:
        half.write('{"model": "b", "conc')
    again = PointsFile(tmp_path, plan, configs)
    assert again.points == [point]
    assert again.has(keys[0])
    assert not again.has(keys[1])
    again.append(point)
    assert len(file.path.read_text().splitlines()) == 2
    with pytest.raises(ConfigError, match="measured with another seed"):
        PointsFile(tmp_path, plan_of(seed=1), configs)


def test_memory_is_asked_for_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    config = presets.build("transformer++", 4, **TINY)
    plan = plan_of(models=("a",), lengths=(Lengths(10**6, 10**6),))
    monkeypatch.setattr("sambay.studies.generation_run.available_bytes", lambda device: 1 << 28)
    with pytest.raises(NotEnoughMemory, match=r"slots? x \d+ columns .* would fit"):
        require_memory_for(plan, {"a": config})
    monkeypatch.setattr("sambay.studies.generation_run.available_bytes", lambda device: 1000)
    with pytest.raises(ConfigError, match="--models: their weights need"):
        require_memory_for(plan, {"a": config})


def test_the_command_measures_writes_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("sambay", "transformer++"):
        config = presets.build(name, 4, **TINY, **({"window": 5} if name == "sambay" else {}))
        (tmp_path / f"{name}.json").write_text(json.dumps(config.to_dict()))
    models = [str(tmp_path / f"{name}.json") for name in ("sambay", "transformer++")]
    words = [
        "bench", "generation", "--models", *models, "--lengths", "16/24", "--divide", "4",
        "--concurrency", "2", "1", "--rounds", "1", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    assert main([*words, "--dry-run"]) == 0
    assert "4 measurements in 1 rounds" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert main(words) == 0
    assert "round 1" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["plan"]["lengths"] == [{"prompt": 4, "generated": 6}]
    assert result["plan"]["concurrencies"] == [1, 2]
    assert result["environment"]["packages"]
    assert result["summary"]["baseline"] == "transformer++"
    assert len(result["points"]) == 4
    assert "| sambay | 1 |" in (tmp_path / "out" / "results.md").read_text()
    assert main(words) == 0
    assert "round 1 " not in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results.json").read_text())["points"] == result["points"]
    assert main([*words, "--seed", "1"]) == 2
    assert "measured with another seed" in capsys.readouterr().err


def test_weights_of_other_numbers_are_another_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    config = presets.build("transformer++", 4, **TINY)
    (tmp_path / "small.json").write_text(json.dumps(config.to_dict()))
    words = [
        "bench", "generation", "--models", str(tmp_path / "small.json"), "--lengths", "4/6",
        "--concurrency", "2", "--rounds", "1", "--out", str(tmp_path / "out"), "--weights", "int8",
    ]  # fmt: skip
    assert main(words) == 0
    assert ", float32 with int8 weights, random" in (tmp_path / "out" / "results.md").read_text()
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["plan"]["weights"] == "int8"
    if why_unavailable() is None:
        assert [point["step_mode"] for point in result["points"]] == ["captured"]
    assert main(words[:-2]) == 2
    assert "measured with another weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "sambay-21m"], "did you mean 'sambay-20m'"),
        (["--models", "sambay-20m", "sambay-20m"], "named twice"),
        (["--models", "nowhere.json"], "nowhere.json: no readable JSON"),
        (["--lengths", "2000"], "write PROMPT/GENERATED"),
        (["--lengths", "0/5"], "write PROMPT/GENERATED"),
        (["--concurrency", "0"], "concurrency is 0"),
        (["--rounds", "0"], "rounds is 0"),
        (["--spread", "0.7"], "spread is 0.7"),
        (["--divide", "0"], "--divide 0"),
        (["--baseline", "phi4-mini"], "--baseline phi4-mini is not among"),
        (["--device", "abacus"], "--device abacus"),
    ],
)
def test_mistakes_are_named(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["bench", "generation", "--models", "sambay-20m", "--out", str(tmp_path / "out")]
    assert main([*start, *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_mistake_in_a_configuration_is_named_with_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "typo.json"
    file.write_text('{"hidden_sze": 64}')
    words = ["bench", "generation", "--models", str(file), "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "typo.json: model.hidden_sze: no such field" in capsys.readouterr().err
