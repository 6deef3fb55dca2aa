"""Native model folders: round trip, one format with transformers, dtypes, refusals by name."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sambay.errors import CheckpointMismatch, ConfigError
from sambay.files import WriteFailed
from sambay.model import weights_writer
from sambay.model.folder import (
    config_values,
    load_model_folder,
    parse_config,
    save_model_folder,
)
from tests.tiny import NAMES, random_ids, tiny_config, tiny_model

COMPANIONS = (
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "source" / "tokenizer.json"
    path.parent.mkdir()
    path.write_text("{}")
    for name in COMPANIONS:
        path.with_name(name).write_text(f'"{name}"')
    path.with_name("notes.txt").write_text("not the tokenizer's")
    return path


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(name: str, tied: bool, tokenizer: Path, tmp_path: Path) -> None:
    model = tiny_model(name, dtype=torch.float32, tie_embeddings=tied)
    save_model_folder(tmp_path / "model", model, tokenizer)
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", *COMPANIONS,
    }  # fmt: skip
    for file in COMPANIONS:
        assert (tmp_path / "model" / file).read_text() == f'"{file}"'
    loaded = load_model_folder(tmp_path / "model", expected=model.config)
    assert loaded.config == model.config
    assert not loaded.training
    assert (loaded.head_weight is loaded.embedding.weight) == tied
    mine, theirs = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert all(parameter.requires_grad for parameter in theirs.values())
    with torch.no_grad():
        assert torch.equal(model(random_ids(2, 7)), loaded(random_ids(2, 7)))


def test_the_folder_is_one_that_transformers_knows(tmp_path: Path) -> None:
    model = tiny_model("sambay", dtype=torch.float32, tie_embeddings=False)
    save_model_folder(tmp_path / "model", model)
    names = set(load_file(tmp_path / "model" / "model.safetensors"))
    assert "lm_head.weight" in names
    assert {"model.embedding.weight", "model.blocks.0.mixer.in_proj.weight"} < names
    assert all(name.startswith("model.") for name in names - {"lm_head.weight"})
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    assert values["model_type"] == "sambay"
    assert values["architectures"] == ["SambaYForCausalLM"]
    assert values["dtype"] == "float32"
    assert values["tie_word_embeddings"] is False
    assert values["num_hidden_layers"] == 8
    linear, sliding, full = "linear_attention", "sliding_attention", "full_attention"
    assert values["layer_types"] == [
        linear, sliding, linear, sliding, linear, full, linear, full,
    ]  # fmt: skip


@pytest.mark.parametrize("max_shard_bytes", [1, 20_000, 90_000])
def test_shards_hold_the_same(max_shard_bytes: int, tmp_path: Path) -> None:
    model = tiny_model("sambay+da", dtype=torch.float32)
    path = tmp_path / "model"
    save_model_folder(path, model, max_shard_bytes=max_shard_bytes)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    parameters = dict(model.named_parameters())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in parameters.values())
    for file in files:
        tensors = load_file(path / file)
        assert {index["weight_map"][name] for name in tensors} == {file}
        size = sum(value.nbytes for value in tensors.values())
        assert size <= max_shard_bytes or len(tensors) == 1
    loaded = dict(load_model_folder(path).named_parameters())
    assert all(torch.equal(loaded[name], value) for name, value in parameters.items())


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
        expected = parameter if name in kept else parameter.bfloat16()
        assert torch.equal(expected, dict(loaded.named_parameters())[name])


def test_saving_again_replaces(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_model_folder(path, tiny_model("sambay"), tokenizer)
    (path / "stale").write_text("x")
    save_model_folder(path, tiny_model("samba"), tokenizer)
    assert load_model_folder(path).config.layer_pattern == tiny_config("samba").layer_pattern
    assert not (path / "stale").exists()
    assert {entry.name for entry in tmp_path.iterdir()} == {"model", "source"}


@pytest.mark.parametrize("what", ["folder", "file"])
def test_other_peoples_files_are_not_replaced(what: str, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    if what == "folder":
        path.mkdir()
    file = path / "thesis.txt" if what == "folder" else path
    file.write_text("x")
    with pytest.raises(WriteFailed, match="precious exists and is no model folder"):
        save_model_folder(path, tiny_model("samba"))
    assert file.read_text() == "x"


def test_a_failed_save_leaves_the_old_folder(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    model = tiny_model("sambay", dtype=torch.float32)
    save_model_folder(path, model, tokenizer)

    def broken(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights_writer, "_write_all", broken)
    with pytest.raises(WriteFailed, match="the disk is full"):
        save_model_folder(path, tiny_model("samba"), tokenizer)
    assert load_model_folder(path).config == model.config
    assert {entry.name for entry in tmp_path.iterdir()} == {"model", "source"}


def test_a_config_written_by_other_programs_is_read() -> None:
    config = tiny_config("sambay+da", tie_embeddings=False)
    values = json.loads(json.dumps(config_values(config, torch.bfloat16)))
    foreign = {
        "use_cache": True, "transformers_version": "5.23.0", "eos_token_id": 3,
        "hidden_act": "silu",
        "num_attention_heads": 8, "sliding_window": 5, "attention_dropout": 0.0,
        "max_position_embeddings": 100, "rope_parameters": None, "id2label": {"0": "a"},
        "initializer_range": 0.02, "output_hidden_states": False, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
    }  # fmt: skip
    assert parse_config(values | foreign) == config
    del values["format_version"]
    assert parse_config(values | foreign) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widnow": 3, "window": None}, r"model.widnow: no such field \(did you mean 'window'"),
        ({"hiden_size": 3, "hidden_size": None}, "model.hiden_size: .*did you mean 'hidden_size'"),
        ({"hidden_size": None}, "model.hidden_size: missing"),
        ({"num_hidden_layers": 9}, "layer_pattern has 8 layers, num_layers says 9"),
        ({"model_type": "llama"}, "model_type = 'llama'"),
        ({"format_version": 7}, "format_version = 7"),
    ],
)
def test_a_wrong_config_is_refused(change: dict[str, Any], message: str) -> None:
    values = config_values(tiny_config("sambay")) | change
    values = {name: value for name, value in values.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        parse_config(values)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing tensor", r"misses tensor 'model.blocks\.0\.mixer\.A_log'; it belongs to"),
        ("extra tensors", "has 10 unknown tensors 'model.blocks.99.x0', .*'.*x7' and 2 more"),
        ("shape", r"has 'model.norm.weight' of shape \(35,\) where \(36,\) is needed"),
        ("cut", r"model.safetensors is incomplete: 100 of its [\d,]+ bytes are missing"),
        ("no weights", "model has no weights: neither"),
        ("no config", "config.json does not exist"),
        ("config syntax", "config.json cannot be read"),
        ("config list", "config.json holds no JSON object"),
        ("config version", "config.json: format_version = 7"),
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
        del tensors["model.blocks.0.mixer.A_log"]
    if damage == "extra tensors":
        tensors |= {f"model.blocks.99.x{index}": torch.zeros(1) for index in range(10)}
    if damage == "shape":
        tensors["model.norm.weight"] = tensors["model.norm.weight"][1:]
    if damage in ("missing tensor", "extra tensors", "shape"):
        save_file(tensors, weights)
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    if damage == "no weights":
        weights.unlink()
    if damage == "no config":
        config.unlink()
    if damage == "config syntax":
        config.write_text("{")
    if damage == "config list":
        config.write_text("[]")
    if damage == "config version":
        config.write_text(json.dumps({**values, "format_version": 7}))
    expected = model.config.replace(window=9) if damage == "other architecture" else None
    with pytest.raises(CheckpointMismatch, match=message) as caught:
        load_model_folder(path, expected=expected)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stored", NAMES)
def test_what_other_tensors_would_fit_is_said(stored: str, tmp_path: Path) -> None:
    """The pattern told from the tensors is that of the model that wrote them, up to S for F."""
    path = tmp_path / "model"
    other = "sambay" if "F" not in tiny_config(stored).layer_pattern else "samba"
    model = tiny_model(stored, dtype=torch.float32, vocab_size=70, intermediate_size=44)
    save_model_folder(path, model)
    wrong = config_values(tiny_config(other, window=5))
    (path / "config.json").write_text(json.dumps(wrong))
    with pytest.raises(CheckpointMismatch, match="its tensors fit") as caught:
        load_model_folder(path)
    message = str(caught.value)
    assert "vocab_size = 70 (configured: 61)" in message
    assert "intermediate_size = 44 (configured: 52)" in message
    if stored not in ("transformer++", "transformer-ls"):  # no tensor tells S from F there
        pattern = model.config.layer_pattern
        assert f"its tensors fit layer_pattern = '{pattern}' (configured: " in message
    if (kind := model.config.recurrent_kind) != "mamba":
        assert f"recurrent_kind = '{kind}' (configured: 'mamba')" in message
        assert "gated_memory = 'normalised' (configured: 'plain')" in message
