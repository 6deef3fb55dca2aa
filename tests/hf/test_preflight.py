"""Damaged, foreign and incomplete folders given to `from_pretrained`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sambay.errors import CheckpointMismatch, ConfigError, SambayError
from sambay.hf.configuration import Phi4FlashConfig, SambaYConfig
from sambay.hf.modeling import Phi4FlashForCausalLM, SambaYForCausalLM, SambaYModel
from tests.hf.tiny_hf import OFFICIAL, fresh_pair, pair, tiny_native, twin

KINDS = ("sambay", OFFICIAL)
NORM = {"sambay": "model.norm.weight", OFFICIAL: "model.final_layernorm.weight"}
Change = Callable[[dict[str, torch.Tensor]], object]


def saved(name: str, folder: Path, **options: Any) -> Path:
    pair(name)[1].save_pretrained(folder, **options)
    return folder


def change_tensors(folder: Path, change: Change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def change_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def refused(folder: Path, message: str, model: Any = AutoModelForCausalLM, **options: Any) -> str:
    """The one line that a load ends with."""
    with pytest.raises(SambayError, match=message) as caught:
        model.from_pretrained(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", KINDS)
def test_missing_and_surplus_tensors_are_listed(name: str, tmp_path: Path) -> None:
    folder = saved(name, tmp_path / "model")
    norm = NORM[name]
    change_tensors(folder, lambda tensors: tensors.pop(norm))
    refused(folder, f"misses tensor '{re.escape(norm)}'")
    change_tensors(folder, lambda tensors: tensors.update({"model.extra.weight": torch.ones(1)}))
    refused(folder, f"misses tensor '{re.escape(norm)}' and has .*'model.extra.weight'")
    # Where transformers is asked to report such things itself, it does.
    told: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    _, info = told
    assert info["missing_keys"] == {"model.norm.weight"}


@pytest.mark.parametrize("name", KINDS)
def test_tensors_of_another_depth_say_what_they_fit(name: str, tmp_path: Path) -> None:
    folder = saved(name, tmp_path / "model")
    if name == OFFICIAL:
        change_config(folder, num_hidden_layers=4, layer_types=None)
    else:
        change_config(folder, layer_pattern="M S M F", num_hidden_layers=None, layer_types=None)
    line = refused(folder, "unknown tensors")
    assert "fit layer_pattern = '2x(M S) M F G C'" in line


@pytest.mark.parametrize("name", KINDS)
def test_wrong_shapes_name_the_tensor_and_the_field(name: str, tmp_path: Path) -> None:
    folder = saved(name, tmp_path / "model")
    change_config(folder, vocab_size=77)
    line = refused(folder, "has 'model.embed.*' of shape")
    assert "vocab_size = 61 (configured: 77)" in line
    # The user may ask for new rows instead.
    model = AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert model.get_input_embeddings().weight.shape[0] == 77


@pytest.mark.parametrize("name", KINDS)
def test_half_downloaded_shards(name: str, tmp_path: Path) -> None:
    folder = saved(name, tmp_path / "model", max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[:-100])
    refused(folder, f"{shards[1].name} is incomplete: 100 of its .* bytes are missing")
    shards[1].unlink()
    refused(folder, f"names file '{shards[1].name}' that is not there")
    shards[1].write_bytes(content)
    AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", KINDS)
def test_pickled_weights_are_read_only_when_asked_for(name: str, tmp_path: Path) -> None:
    folder = saved(name, tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, "has only pickled weights .*pass use_safetensors=False")
    asked = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=False)
    ids = torch.arange(5)[None]
    with torch.no_grad():
        assert torch.equal(asked(ids).logits, pair(name)[1](ids).logits)


def test_configurations_of_another_type(tmp_path: Path) -> None:
    native, published = (saved(name, tmp_path / name) for name in KINDS)
    line = refused(native, "model_type = 'sambay' does not belong", Phi4FlashForCausalLM)
    assert "use SambaYForCausalLM or AutoModelForCausalLM" in line
    line = refused(published, "model_type = 'phi4flash' does not belong", SambaYForCausalLM)
    assert "use Phi4FlashForCausalLM" in line
    other = SambaYConfig.from_pretrained(native)
    refused(published, "'sambay' does not belong to Phi4Flash", Phi4FlashForCausalLM, config=other)
    change_config(native, model_type="llama")
    line = refused(native, "config.json: model_type = 'llama'", SambaYForCausalLM)
    assert "SambaYForCausalLM reads 'sambay'" in line
    (native / "config.json").write_text("{")
    refused(native, "config.json cannot be read", SambaYForCausalLM)


def test_fields_given_beside_the_folder_count(tmp_path: Path) -> None:
    folder = saved("sambay", tmp_path / "model")
    refused(folder, r"configured: 99", SambaYForCausalLM, vocab_size=99)
    model = SambaYForCausalLM.from_pretrained(folder, use_cache=False)
    assert model.config.use_cache is False
    (tmp_path / "model").rename(tmp_path / "inner")
    model = SambaYForCausalLM.from_pretrained(tmp_path, subfolder="inner")
    assert model.config.vocab_size == 61
    change_tensors(tmp_path / "inner", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointMismatch, match="misses tensor"):
        SambaYForCausalLM.from_pretrained(tmp_path, subfolder="inner")


def test_a_model_without_its_head_is_left_to_transformers(tmp_path: Path) -> None:
    model = twin(tiny_native("sambay", tie_embeddings=False))
    model.model.save_pretrained(tmp_path / "base")
    loaded = SambaYForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)
    model.save_pretrained(tmp_path / "whole")
    base = SambaYModel.from_pretrained(tmp_path / "whole")
    assert torch.equal(base.norm.weight, model.model.norm.weight)


def test_folders_without_weights_and_names_that_are_no_folders(tmp_path: Path) -> None:
    folder = saved("sambay", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="no file named"):
        SambaYForCausalLM.from_pretrained(folder)
    with pytest.raises(OSError):
        SambaYForCausalLM.from_pretrained(tmp_path / "nothing")


def test_state_dicts_are_taken_as_they_are() -> None:
    _, model = fresh_pair("sambay")
    loaded = SambaYForCausalLM.from_pretrained(
        None, config=model.config, state_dict=model.state_dict()
    )
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_pattern": "M S M Q"}, "layer_pattern"),
        ({"num_heads": 7}, "num_heads"),
        ({"sliding_window": [5, 6]}, "sliding_window lists several sizes"),
        ({"num_hidden_layers": 9}, "num_hidden_layers = 9 contradicts layer_pattern"),
        ({"layer_types": ["full_attention"]}, "layer_types = .* contradicts layer_pattern"),
    ],
)
def test_fields_that_cannot_work(fields: dict[str, Any], message: str) -> None:
    values = pair("sambay")[1].config.to_dict() | fields
    with pytest.raises(ConfigError, match=message):
        SambaYConfig(**values)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 6}, "num_hidden_layers = 6"),
        ({"mb_per_layer": 3}, "mb_per_layer = 3"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"num_attention_heads": 7}, "num_attention_heads = 7"),
        ({"sliding_window": [5] * 3}, "sliding_window has 3 entries for 8 layers"),
    ],
)
def test_official_fields_that_cannot_work(fields: dict[str, Any], message: str) -> None:
    values = pair(OFFICIAL)[1].config.to_dict() | {"layer_types": None} | fields
    with pytest.raises(ConfigError, match=message):
        Phi4FlashConfig(**values)
