"""Model folders: round trip, dtypes, and refusals by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sambay.errors import CheckpointMismatch
from sambay.files import WriteFailed
from sambay.model import folder as model_folder
from sambay.model.folder import load_model_folder, save_model_folder
from tests.tiny import NAMES, random_ids, tiny_config, tiny_model


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "source" / "tokenizer.json"
    path.parent.mkdir()
    path.write_text("{}")
    path.with_name("tokenizer_config.json").write_text('{"eos_token": "e"}')
    return path


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(name: str, tied: bool, tokenizer: Path, tmp_path: Path) -> None:
    model = tiny_model(name, dtype=torch.float32, tie_embeddings=tied)
    save_model_folder(tmp_path / "model", model, tokenizer)
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    loaded = load_model_folder(tmp_path / "model", expected=model.config)
    assert loaded.config == model.config
    assert not loaded.training
    assert (loaded.head_weight is loaded.embedding.weight) == tied
    mine, theirs = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    with torch.no_grad():
        assert torch.equal(model(random_ids(2, 7)), loaded(random_ids(2, 7)))


def test_bfloat16_leaves_the_state_parameters_alone(tokenizer: Path, tmp_path: Path) -> None:
    model = tiny_model("sambay+da", dtype=torch.float32)
    save_model_folder(tmp_path / "model", model, tokenizer)
    loaded = load_model_folder(tmp_path / "model", dtype=torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in loaded.named_parameters()}
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert {name.rpartition(".")[2] for name in kept} == {
        "A_log", "D", "dt_bias", "lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2",
    }  # fmt: skip
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    for name, parameter in model.named_parameters():
        if name in kept:
            assert torch.equal(parameter, dict(loaded.named_parameters())[name])


def test_saving_again_replaces(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_model_folder(path, tiny_model("sambay"), tokenizer)
    (path / "stale").write_text("x")
    save_model_folder(path, tiny_model("samba"), tokenizer)
    assert load_model_folder(path).config.layer_pattern == tiny_config("samba").layer_pattern
    assert not (path / "stale").exists()
    assert {entry.name for entry in tmp_path.iterdir()} == {"model", "source"}


def test_a_failed_save_leaves_the_old_folder(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    model = tiny_model("sambay", dtype=torch.float32)
    save_model_folder(path, model, tokenizer)

    def broken(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_folder, "save_file", broken)
    with pytest.raises(WriteFailed, match="the disk is full"):
        save_model_folder(path, tiny_model("samba"), tokenizer)
    assert load_model_folder(path).config == model.config
    assert {entry.name for entry in tmp_path.iterdir()} == {"model", "source"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing tensor", r"misses tensor 'blocks\.0\.mixer\.A_log'"),
        ("extra tensor", "has an unknown tensor 'blocks.99.x' and 1 more"),
        ("shape", r"'norm.weight' has shape \(35,\), the model needs \(36,\)"),
        ("cut", "model.safetensors is damaged"),
        ("no weights", "model.safetensors does not exist"),
        ("no config", "config.json does not exist"),
        ("config syntax", "config.json cannot be read"),
        ("config field", "model.widnow: no such field .*did you mean 'window'"),
        ("config version", "format_version = 7"),
        ("other architecture", "model.window = 5, expected 9"),
    ],
)
def test_refusals_name_what_is_wrong(
    damage: str, message: str, tokenizer: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    model = tiny_model("sambay", dtype=torch.float32)
    save_model_folder(path, model, tokenizer)
    weights, config = path / "model.safetensors", path / "config.json"
    tensors, values = load_file(weights), json.loads(config.read_text())
    if damage == "missing tensor":
        del tensors["blocks.0.mixer.A_log"]
    if damage == "extra tensor":
        tensors |= {"blocks.99.x": torch.zeros(1), "blocks.99.y": torch.zeros(1)}
    if damage == "shape":
        tensors["norm.weight"] = tensors["norm.weight"][1:]
    if damage in ("missing tensor", "extra tensor", "shape"):
        save_file(tensors, weights)
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    if damage == "no weights":
        weights.unlink()
    if damage == "no config":
        config.unlink()
    if damage == "config syntax":
        config.write_text("{")
    if damage == "config field":
        config.write_text(json.dumps({**values, "widnow": 3}))
    if damage == "config version":
        config.write_text(json.dumps({**values, "format_version": 7}))
    expected = model.config.replace(window=9) if damage == "other architecture" else None
    with pytest.raises(CheckpointMismatch, match=message) as caught:
        load_model_folder(path, expected=expected)
    assert "\n" not in str(caught.value)
