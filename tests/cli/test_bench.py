"""`sambay bench` measures what it names; its numbers hang together."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from sambay.cli import bench
from sambay.errors import ConfigError
from sambay.model import LanguageModel
from sambay.spec import presets
from sambay.spec.footprint import cache_bytes
from sambay.speed import GenerationSpeed, compare_generation, fastest_seconds

TINY = {"vocab_size": 64, "hidden_size": 48, "head_dim": 12, "window": 5}


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(words))


def tiny_models() -> dict[str, LanguageModel]:
    return {
        name: LanguageModel(presets.build(name, 4, **TINY)) for name in ("sambay", "transformer++")
    }


def test_every_model_is_measured_at_every_context() -> None:
    models = tiny_models()
    points = list(compare_generation(models, [7, 33], batch_size=3, steps=2, repeats=2))
    assert [(name, point.context) for name, point in points] == [
        ("sambay", 7), ("transformer++", 7), ("sambay", 33), ("transformer++", 33),
    ]  # fmt: skip
    for name, point in points:
        config = models[name].config
        assert point.cache_bytes == cache_bytes(config, 3, point.context, kv_bytes=4)
        assert point.prefill_seconds > 0
        assert point.step_seconds > 0


def test_prefill_in_chunks_is_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk size that does not divide the context must not skip or repeat tokens."""
    monkeypatch.setattr("sambay.speed.PREFILL_CHUNK", 5)
    seen = []
    model = tiny_models()["sambay"]
    original = model.hidden_states

    def spy(ids: torch.Tensor, **options: object) -> torch.Tensor:
        seen.append((ids.shape[1], options["outputs"]))
        return original(ids, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "hidden_states", spy)
    list(compare_generation({"x": model}, [12], steps=1, repeats=1))
    assert seen[-5:] == [(5, "none"), (5, "none"), (2, "last"), (1, "last"), (1, "last")]


def test_rates_count_all_rows() -> None:
    point = GenerationSpeed(100, 4, prefill_seconds=2.0, step_seconds=0.5, cache_bytes=0)
    assert point.prefill_tokens_per_second == 200
    assert point.decode_tokens_per_second == 8


def test_fastest_reading_counts_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 14.0, 20.0, 23.0])  # a warm-up, then four seconds, then three
    monkeypatch.setattr("sambay.speed.time.perf_counter", lambda: next(clock))
    calls = []
    assert fastest_seconds({"x": lambda: calls.append(1)}, repeats=2) == {"x": 3.0}
    assert len(calls) == 3


def test_command_prints_and_writes_the_same_numbers(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "speed.json"
    arguments = ("demo_sambay", "--contexts", "40", "--repeats", "1", "--json", str(path))
    assert run(*arguments) == 0
    report = json.loads(path.read_text())
    rate = report["training_tokens_per_second"]["demo_sambay"]
    (point,) = report["generation"]["demo_sambay"]
    text = capsys.readouterr().out
    assert f"{rate:,.0f} tokens/s" in text
    assert f"prefill {40 / point['prefill_seconds']:>9,.0f} tokens/s" in text
    assert report["environment"]["packages"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--contexts", "0"), "--contexts 0"),
        (("--repeats", "0"), "--repeats 0"),
        (("--threads", "-1"), "--threads -1"),
        (("--device", "abacus"), "--device abacus"),
        (("demo_samba",), "demo_sambay"),
    ],
)
def test_mistakes_are_named(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(*words)
