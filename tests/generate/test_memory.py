"""Memory is asked for before any work, and the answers are read correctly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sambay.generate import Engine, Request, memory
from sambay.generate.memory import NotEnoughMemory, available_bytes, readable_bytes
from tests.generate.scripted import ScriptedModel
from tests.tiny import tiny_config

CPU = torch.device("cpu")


def limit(monkeypatch: pytest.MonkeyPatch, amount: int) -> None:
    for module in ("memory", "engine"):
        monkeypatch.setattr(f"sambay.generate.{module}.available_bytes", lambda device: amount)


def test_a_batch_that_does_not_fit_is_refused_with_what_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = ScriptedModel([1], prompt_length=1)
    engine = model.engine()
    limit(monkeypatch, engine._batch_bytes(7, 1000))
    requests = [Request([1], 1000)] * 7
    assert len(engine.generate([Request([1], 3)] * 7)) == 7
    calls = len(model.calls)
    with pytest.raises(NotEnoughMemory, match=r"8 x 1000 tokens .*about 7 prompts at a time"):
        engine.generate([*requests, requests[0]])
    with pytest.raises(NotEnoughMemory, match=r"1 x 90000000 tokens .*lower max_new_tokens"):
        engine.generate_many([*requests, Request([1], 90_000_000)], max_batch_size=4)
    assert len(model.calls) == calls


def test_the_real_machine_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    amount = available_bytes(CPU)
    assert amount is not None
    assert 1 << 20 < amount < 1 << 50
    model = ScriptedModel([1], prompt_length=1)
    with pytest.raises(NotEnoughMemory, match=r"TiB of memory on cpu, .* are available"):
        model.engine().stream([Request([1], 1 << 40)])


def test_kernel_and_container_limits_are_both_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    4096 kB\nCached: 1 kB\n")
    assert available_bytes(CPU) == 4096 * 1024
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(CPU) == 4096 * 1024
    (tmp_path / "memory.max").write_text("1000000\n")
    assert available_bytes(CPU) == 100_000
    (tmp_path / "memory.stat").write_text("anon 800000\ninactive_file 50000\n")
    assert available_bytes(CPU) == 150_000
    (tmp_path / "memory.current").write_text("1200000\n")
    assert available_bytes(CPU) == 0
    (tmp_path / "memory.max").unlink()
    (tmp_path / "meminfo").unlink()
    assert (available_bytes(CPU) or 0) > 1 << 20
    assert available_bytes(torch.device("meta")) is None


def test_the_need_grows_with_rows_and_columns_and_is_bounded_by_the_chunk() -> None:
    config = tiny_config("sambay")

    def need(rows: int, columns: int, chunk: int = 64) -> int:
        return memory.batch_bytes(config, rows, columns, chunk=chunk, value_bytes=4)

    assert need(1, 100) < need(2, 100) < need(2, 1000)
    growth_per_token = 2 * config.num_kv_heads * config.head_dim * 4
    assert need(1, 2000) - need(1, 1000) == 1000 * growth_per_token
    assert need(1, 1000, chunk=512) > need(1, 1000, chunk=64)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (5 << 30, "5.0 GiB"),
        (1 << 52, "4096.0 TiB"),
    ],
)
def test_bytes_are_readable(count: int, text: str) -> None:
    assert readable_bytes(count) == text


def test_an_engine_reports_its_place() -> None:
    engine = Engine(ScriptedModel([1], 1))  # pyright: ignore[reportArgumentType]
    assert (engine.device, engine.dtype) == (CPU, torch.float32)
