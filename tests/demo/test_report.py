"""The demo's table, pictures and report say what was measured; plans are kept for a second run."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from sambay.data.shards import TokenDataset
from sambay.demo.compressors import bits_per_byte
from sambay.demo.plan import PLAN_FILE, Plan, has_other_length, make_plan, read_plan
from sambay.demo.report import (
    DemoResult,
    ModelResult,
    as_table,
    quality_rows,
    speed_rows,
    write_report,
)
from sambay.files import write_json
from sambay.recipes.demo import demo_sambay
from sambay.spec import presets
from sambay.speed import GenerationSpeed


def example() -> DemoResult:
    config = presets.build("sambay", 4)
    history = [
        {"tokens": 100, "seconds": 1.0, "loss": 5.0},
        {"tokens": 200, "seconds": 4.0, "loss": 4.0, "validation_bits_per_byte": 2.5},
    ]
    speed = [
        GenerationSpeed(512, 2, prefill_seconds=0.5, step_seconds=0.25, cache_bytes=1 << 20),
        GenerationSpeed(2048, 2, prefill_seconds=4.0, step_seconds=0.5, cache_bytes=3 << 20),
    ]
    models = [
        ModelResult(title, config, 6_130_000, history, bits, speed)
        for title, bits in (("SambaY", 1.5), ("Transformer++", 1.75))
    ]
    return DemoResult(
        models=models,
        compressors={"gzip -9": 2.0, "xz -9": 1.7, "xz -9, primed": 1.2},
        validation_bytes=3_000,
        validation_tokens=1_000,
        total_tokens=200,
        environment="a machine",
        command="python -m sambay.demo",
        date="2026-01-02",
        commit="abc",
        prompt="def f(",
        continuation="x):",
        seconds=120.0,
    )


def test_tables_hold_the_measured_numbers() -> None:
    assert quality_rows(example())[1:] == [
        ("SambaY", "6.13 M", "1.500"),
        ("Transformer++", "6.13 M", "1.750"),
        ("gzip -9", "", "2.000"),
        ("xz -9", "", "1.700"),
        ("xz -9, primed", "", "1.200"),
    ]
    rows = {row[0]: row[1] for row in speed_rows(example())}
    assert rows["training, tokens/s"] == "50"
    assert rows["prefill at 512, tokens/s"] == "2,048"  # both rows of the batch count
    assert rows["decode at 2,048, tokens/s"] == "4"
    assert rows["cache at 2,048, MiB"] == "3.0"


def test_table_is_aligned() -> None:
    lines = as_table([("", "a"), ("long name", "1"), ("b", "1,000")]).splitlines()
    assert lines[0].endswith("    a")
    assert len({len(line) for line in lines}) == 1


def test_report_is_complete(tmp_path: Path) -> None:
    paths = write_report(example(), tmp_path)
    assert all(path.stat().st_size > 0 for path in paths)
    text = (tmp_path / "report.md").read_text()
    for picture in ("losses.png", "speed.png", "architecture.png"):
        assert f"({picture})" in text
        assert (tmp_path / picture).exists()
    assert "def f(x):" in text
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["models"][0]["bits_per_byte"] == 1.5
    assert results["models"][1]["speed"][0]["cache_bytes"] == 1 << 20


def test_primed_xz_counts_only_what_is_new() -> None:
    training = bytes(range(256)) * 8
    bits = bits_per_byte(training[:1024], training)
    assert bits["xz -9, primed"] < 0.2 < bits["xz -9"]
    size = len(lzma.compress(training[:1024], preset=9))
    assert bits["xz -9"] == 8 * size / 1024


def test_plan_is_kept_and_used_only_for_the_same_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"a": 1.0, "b": 2.0}
    monkeypatch.setattr("sambay.demo.plan._seconds_per_step", lambda recipes, training: seconds)
    recipes = {"a": demo_sambay(), "b": demo_sambay()}
    tokens_per_step = recipes["a"].tokens_per_step

    def plan_for(minutes: float, num_tokens: int) -> Plan:
        training = cast(TokenDataset, SimpleNamespace(num_tokens=num_tokens))
        validation = cast(TokenDataset, SimpleNamespace(num_tokens=3 * tokens_per_step))
        return make_plan(tmp_path, minutes, recipes, training, validation)

    plan = plan_for(10.0, 10_000_000)
    steps, rest = divmod(plan.total_tokens, tokens_per_step)
    assert rest == 0
    # 9 of 10 minutes, 2 seconds per step of the slower model, 6 evaluations of 2 seconds each
    assert steps == (540 - 6 * 2) // 2
    assert read_plan(tmp_path, 10.0) == plan
    assert read_plan(tmp_path, 5.0) is None
    (tmp_path / PLAN_FILE).unlink()
    assert read_plan(tmp_path, 10.0) is None
    assert plan_for(10.0, 10 * tokens_per_step).total_tokens == 30 * tokens_per_step
    # 54 seconds: a fifth of them pays for 5 evaluations of 2 seconds
    plan = plan_for(1.0, 10_000_000)
    assert plan.total_tokens == (54 - 5 * 2) // 2 * tokens_per_step
    assert plan.eval_every_steps == 4
    assert plan_for(0.001, 10_000_000).eval_every_steps == 1


def test_run_of_another_length_is_not_continued(tmp_path: Path) -> None:
    config = demo_sambay()
    same = Plan(1.0, config.schedule.total_tokens, 10)
    assert not has_other_length(tmp_path, same)
    write_json(tmp_path / "config.json", config.to_dict())
    assert not has_other_length(tmp_path, same)
    assert has_other_length(tmp_path, Plan(1.0, same.total_tokens + 1, 10))
