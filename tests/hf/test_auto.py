"""Folders through the Auto classes: native and official, shards, dtypes, devices, exact bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
)
from transformers.core_model_loading import revert_weight_conversion

import sambay
from sambay.hf import key_map, official
from sambay.hf.configuration import Phi4FlashConfig, SambaYConfig
from sambay.hf.modeling import (
    Phi4FlashForCausalLM,
    Phi4FlashModel,
    SambaYForCausalLM,
    SambaYModel,
)
from sambay.model import LanguageModel
from sambay.model.folder import save_model_folder, stored_name
from sambay.spec import ModelConfig, presets
from tests.hf.tiny_hf import EOS, OFFICIAL, VARIANTS, fresh_pair, pair, tiny_native, twin
from tests.parity.formula_checkpoint import official_config
from tests.tiny import NAMES, random_ids, tiny_config

KINDS = ("sambay", OFFICIAL)
FLOAT32 = ("A_log", "D", "dt_bias", "lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


def dtypes(model: nn.Module) -> dict[str, set[torch.dtype]]:
    """The dtypes of the parameters that must stay float32, and of all others."""
    found: dict[str, set[torch.dtype]] = {"guarded": set(), "others": set()}
    for name, parameter in model.named_parameters():
        kind = "guarded" if name.rsplit(".", 1)[-1] in FLOAT32 else "others"
        found[kind].add(parameter.dtype)
    return found


def guarded(dtype: torch.dtype) -> dict[str, set[torch.dtype]]:
    """The `dtypes` of a model in this dtype."""
    return {"guarded": {torch.float32}, "others": {dtype}}


def stored(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def same_bytes(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        other = theirs[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)), name


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_saved_and_loaded_is_identical(name: str, tmp_path: Path) -> None:
    """And CORE reads what transformers wrote."""
    native, model = pair(name)
    ids = random_ids(2, 9)
    model.save_pretrained(tmp_path / "once", max_shard_size="30KB")
    assert len(list((tmp_path / "once").glob("model-*-of-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "once")
    assert type(loaded) is (Phi4FlashForCausalLM if name == OFFICIAL else SambaYForCausalLM)
    assert not loaded.training
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(sambay.load_model(tmp_path / "once")(ids), native(ids))
    loaded.save_pretrained(tmp_path / "twice")
    same_bytes(stored(tmp_path / "once"), stored(tmp_path / "twice"))
    assert loaded.generation_config.eos_token_id == EOS


@pytest.mark.parametrize(("name", "tied"), [*((name, True) for name in NAMES), ("sambay", False)])
@torch.no_grad()
def test_native_folders_of_every_family_member(name: str, tied: bool, tmp_path: Path) -> None:
    native = tiny_native(name, tie_embeddings=tied)
    save_model_folder(tmp_path / "model", native)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = random_ids(2, 9)
    assert torch.equal(model(ids).logits, native(ids))
    assert (model.lm_head.weight is model.model.embedding.weight) == tied
    assert model.config.model_config() == native.config
    model.save_pretrained(tmp_path / "again")
    same_bytes(stored(tmp_path / "model"), stored(tmp_path / "again"))
    before, after = (
        json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("model", "again")
    )
    changed = {key for key, value in before.items() if after.get(key) != value}
    assert changed <= {"format_version"}


def test_auto_classes_know_both_types(tmp_path: Path) -> None:
    for name, config_class, base in (
        ("sambay", SambaYConfig, SambaYModel),
        (OFFICIAL, Phi4FlashConfig, Phi4FlashModel),
    ):
        _, model = pair(name)
        model.save_pretrained(tmp_path / name)
        config = AutoConfig.from_pretrained(tmp_path / name)
        assert type(config) is config_class
        assert config.model_config() == model.config.model_config()
        assert type(AutoModel.from_config(config)) is base
        loaded = AutoModel.from_pretrained(tmp_path / name)
        assert type(loaded) is base
        assert torch.equal(loaded.norm.weight, model.model.norm.weight)
        assert json.loads((tmp_path / name / "config.json").read_text())["architectures"] == [
            type(model).__name__
        ]


# --- the official layout


def deep_official(dtype: torch.dtype = torch.float32) -> LanguageModel:
    """All 434 tensors, at a small width; every value is random and exact in bfloat16."""
    native = LanguageModel(official.parse(official_config(num_hidden_layers=32)))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in native.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).mul(0.1).bfloat16())
    return native.to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_all_official_tensors_there_and_back(dtype: torch.dtype, tmp_path: Path) -> None:
    """transformers' conversion against the key map, which `official.save` follows."""
    native = deep_official(dtype)
    extra = official_config(num_hidden_layers=32, torch_dtype=str(dtype)[6:])
    official.save(tmp_path / "source", native, config_extra=extra)
    source = stored(tmp_path / "source")
    assert len(source) == 434
    told: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "source", dtype="auto", output_loading_info=True
    )
    model, info = told
    assert type(model) is Phi4FlashForCausalLM
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert dtypes(model) == guarded(dtype)
    loaded = model.state_dict()
    for name, tensor in native.state_dict().items():
        assert torch.equal(loaded[stored_name(name)], tensor), name
    model.save_pretrained(tmp_path / "back", max_shard_size="100KB")
    same_bytes(source, stored(tmp_path / "back"))
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert official.parse(written) == native.config


def test_conversion_names_the_published_tensors_at_their_published_size() -> None:
    """Names, shapes and byte total of the released checkpoint, without data."""
    config: ModelConfig = presets.phi4_mini_flash()
    with torch.device("meta"):
        model = Phi4FlashForCausalLM(Phi4FlashConfig(**official.describe(config)))
        model = model.to(torch.bfloat16)
        state = {key: x for key, x in model.state_dict().items() if key != "lm_head.weight"}
        written = revert_weight_conversion(model, state)
    own = {name.removeprefix("model."): tuple(x.shape) for name, x in state.items()}
    expected = {
        rule.official: rule.shape(*(own[name] for name in rule.ours))
        for rule in key_map.rules(config)
    }
    assert {name: tuple(x.shape) for name, x in written.items()} == expected
    assert len(written) == 434
    assert sum(x.numel() * x.dtype.itemsize for x in written.values()) == 7_706_608_640


# --- dtypes


@pytest.mark.parametrize("name", KINDS)
def test_dtype_arguments(name: str, tmp_path: Path) -> None:
    _, model = pair(name)
    model.save_pretrained(tmp_path)
    spellings: tuple[dict[str, Any], ...] = (
        {"dtype": "bfloat16"},
        {"torch_dtype": torch.bfloat16},
        {"dtype": torch.bfloat16},
    )
    for options in spellings:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        assert dtypes(loaded) == guarded(torch.bfloat16)
        assert loaded.dtype is torch.bfloat16
    read = AutoModelForCausalLM.from_pretrained
    assert dtypes(read(tmp_path, dtype="auto")) == guarded(torch.float32)
    loaded.save_pretrained(tmp_path)
    assert dtypes(read(tmp_path, dtype="auto")) == guarded(torch.bfloat16)
    assert dtypes(read(tmp_path, dtype=torch.float32)) == guarded(torch.float32)


@pytest.mark.parametrize("name", ["sambay+da", OFFICIAL])
def test_casts_leave_the_recurrence_in_float32(name: str, tmp_path: Path) -> None:
    for cast, dtype in (
        (lambda model: model.to(torch.bfloat16), torch.bfloat16),
        (lambda model: model.bfloat16(), torch.bfloat16),
        (lambda model: model.half(), torch.float16),
        (lambda model: model.to("cpu", torch.float16), torch.float16),
    ):
        native, model = fresh_pair(name)
        model = cast(model)
        assert dtypes(model) == guarded(dtype)
        values = dict(model.named_parameters())
        for key, parameter in native.named_parameters():
            if key.rsplit(".", 1)[-1] in FLOAT32:
                assert torch.equal(values[stored_name(key)], parameter), f"{key} was rounded"
    _, model = fresh_pair(name)
    model = accelerate.dispatch_model(model.bfloat16(), {"": "cpu"}, force_hooks=True)
    assert dtypes(model) == guarded(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(random_ids(1, 5)).logits).all()
    assert dtypes(model) == guarded(torch.bfloat16)


def test_built_in_a_dtype() -> None:
    for config in (
        SambaYConfig.from_model_config(tiny_config("sambay+da")),
        pair(OFFICIAL)[1].config,
    ):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        assert dtypes(model) == guarded(torch.bfloat16)


@pytest.mark.parametrize("name", ["sambay", "mambay", OFFICIAL])
@torch.no_grad()
def test_bfloat16_cached_equals_uncached(name: str) -> None:
    _, model = fresh_pair(name)
    reference = model(random_ids(2, 12)).logits
    model = model.bfloat16()
    ids = random_ids(2, 12)
    whole = model(ids, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    parts = [model(ids[:, :7], past_key_values=cache).logits]
    parts += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(7, 12)]
    assert whole.dtype is torch.bfloat16
    cached = torch.cat(parts, 1)
    # A decode step rounds less often than a pass over all columns, so the two differ by as much as
    # each differs from float32; the cached one may not differ by more.
    torch.testing.assert_close(cached, whole, rtol=0.1, atol=0.03)
    torch.testing.assert_close(whole.float(), reference, rtol=0.1, atol=0.03)
    errors = [(logits.float() - reference).square().mean() for logits in (cached, whole)]
    assert errors[0] <= 1.5 * errors[1]


# --- devices


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
@torch.no_grad()
def test_device_maps(device_map: Any, tmp_path: Path) -> None:
    _, model = pair("sambay+da")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=device_map, low_cpu_mem_usage=True, dtype=torch.bfloat16
    )
    assert dtypes(loaded) == guarded(torch.bfloat16)
    assert loaded.generate(random_ids(1, 4), max_new_tokens=3, eos_token_id=None).shape == (1, 7)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["sambay", OFFICIAL])
@torch.no_grad()
def test_blocks_on_disk(name: str, static: bool, tmp_path: Path) -> None:
    """Weights come from the disk when their block runs, also the memory's and the keys' layers."""
    _, model = pair(name)
    model.save_pretrained(tmp_path / "model")
    places: dict[str, Any] = dict.fromkeys(("model.embedding", "model.norm", "lm_head"), "cpu")
    places |= {f"model.blocks.{i}": "disk" if i % 3 else "cpu" for i in range(8)}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert loaded.model.blocks[4].mixer.A_log.is_meta, "nothing was offloaded"
    ids = random_ids(2, 9)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    options: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None}
    for each in ("own", "plain"):
        cache = StaticCache(config=model.config, max_cache_len=16) if static else None
        run: PreTrainedModel = loaded if each == "own" else model
        options[each] = run.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            **{key: options[key] for key in ("max_new_tokens", "do_sample", "eos_token_id")},
        )
    assert torch.equal(options["own"], options["plain"])


def test_resized_embeddings_are_saved_with_their_size(tmp_path: Path) -> None:
    for name in KINDS:
        _, model = fresh_pair(name)
        model.resize_token_embeddings(70)
        model.save_pretrained(tmp_path / name)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert loaded.config.model_config().vocab_size == 70
        assert loaded(random_ids(1, 3)).logits.shape == (1, 3, 70)
        assert loaded.lm_head.weight is loaded.model.embedding.weight


def test_new_models_are_initialised_like_the_language_model() -> None:
    """A fresh class has no zeros or leftovers, and its scheme gives a usable start."""
    config = tiny_config("sambay+da")
    torch.manual_seed(0)
    model = SambaYForCausalLM(SambaYConfig.from_model_config(config))
    reference = dict(LanguageModel(config).named_parameters())
    for name, parameter in model.named_parameters():
        own = reference["head.weight" if name.startswith("lm_head") else name[6:]]
        assert torch.isfinite(parameter).all(), name
        if own.numel() > 200 and own.std() > 0:
            assert 0.8 < parameter.std() / own.std() < 1.25, name
        elif own.std() == 0:
            assert torch.equal(parameter, own), name


def test_twins_are_complete() -> None:
    """The helper that all tests of these classes stand on copies every tensor."""
    native = tiny_native("sambay", tie_embeddings=False)
    other = twin(native)
    mine = {stored_name(key): value for key, value in native.state_dict().items()}
    assert mine.keys() == other.state_dict().keys()
    assert all(torch.equal(other.state_dict()[key], value) for key, value in mine.items())
