"""`sambay init`: what it writes, what it says, and refusals in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from sambay.cli.init import build_config, parse_fields
from sambay.cli.main import main
from sambay.hf.loading import load_model, read_config
from sambay.spec import presets

TINY = (
    "hidden_size=48", "num_heads=8", "num_kv_heads=4", "head_dim=6", "intermediate_size=76",
    "vocab_size=61", "model.window=5",
)  # fmt: skip


def test_official_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "flash"
    arguments = ["phi4-mini-flash", str(out), *TINY, "--depth", "8", "--layout", "official"]
    assert main(["init", *arguments, "--max-shard-size", "100KB"]) == 0
    printed = capsys.readouterr().out
    model = load_model(out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f"{parameters:,} parameters, 116 tensors" in printed
    assert "2x(M S) M F G C, hidden size 48" in printed
    assert f"wrote {out} (official, bfloat16, seed 0)" in printed
    assert model.config.window == 5
    assert (out / "model-00002-of-00005.safetensors").exists()
    assert main(["init", *arguments]) == 2
    assert "exists already" in capsys.readouterr().err


def test_native_layout(tmp_path: Path) -> None:
    out = tmp_path / "model"
    arguments = ["sambay-mlp", str(out), "--depth", "8", *TINY, "--seed", "3"]
    assert main(["init", *arguments, "--dtype", "float32"]) == 0
    config = read_config(out)
    assert config.memory_source == "mlp"
    assert config.hidden_size == 48
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}


def test_the_released_preset_is_untouched_without_changes() -> None:
    assert build_config("phi4-mini-flash", None, {}) == presets.phi4_mini_flash()
    assert build_config("phi4-mini-flash", 32, {}) == presets.phi4_mini_flash()
    assert build_config("sambay", 16, {}) == presets.build("sambay", 16)
    changed = build_config("phi4-mini-flash", 12, parse_fields(["head_dim=32"]))
    assert changed.num_layers == 12
    assert changed.attention_scale == pytest.approx(32**-0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["phi4", "{out}"], "preset 'phi4' does not exist"),
        (["mambya", "{out}"], "preset 'mambya' does not exist (did you mean 'mambay'?)"),
        (["sambay", "{out}"], "--depth is missing"),
        (["sambay", "{out}", "--depth", "10"], "--depth 10; layers repeat in fours"),
        (["phi4-mini-flash", "{out}", "--depth", "0"], "--depth 0; layers repeat"),
        (["sambay", "{out}", "windw=5", "--depth", "8"], "(did you mean 'window'?)"),
        (["sambay", "{out}", "window", "--depth", "8"], "'window' is not an override"),
        (["sambay", "{out}", "window=x", "--depth", "8"], "window = 'x'; it must be a whole"),
        (["sambay", "{out}", "window=5", "model.window=6", "--depth", "8"], "window is given twi"),
        (["sambay", "{out}", "--depth", "8", "--layout", "official"], "norm = rms does not fit"),
        (["sambay", "{out}", "--depth", "8", "--seed", "-1"], "--seed -1 is negative"),
        (["sambay", "{out}", "--depth", "8", "--max-shard-size", "big"], "'big' is not a size"),
        (["phi4-mini-flash", "{out}", "--depth", "8", "layer_pattern=M"], "exclude each other"),
    ],
)
def test_refusals(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [text.replace("{out}", str(tmp_path / "out")) for text in arguments]
    assert main(["init", *given]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
