"""Official folders: names, shapes, dtypes and bytes both ways; configurations told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sambay.errors import CheckpointMismatch, ConfigError
from sambay.hf import key_map, loading, official
from sambay.model import LanguageModel
from sambay.model.folder import save_model_folder
from sambay.spec import ModelConfig, presets
from tests.tiny import random_ids, tiny_config, tiny_model

DEPTH, HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 8, 48, 76, 8, 4, 6, 61
RAW: dict[str, Any] = {
    "architectures": ["Phi4FlashForCausalLM"], "model_type": "phi4flash", "vocab_size": VOCAB,
    "attention_dropout": 0.0, "auto_map": {"AutoConfig": "configuration_phi4flash.Phi4FlashConfig"},
    "bos_token_id": 3, "eos_token_id": [3, 5], "hidden_act": "silu", "hidden_size": HIDDEN,
    "initializer_range": 0.02, "intermediate_size": MLP, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 777, "mb_per_layer": 2, "num_attention_heads": HEADS,
    "num_hidden_layers": DEPTH, "num_key_value_heads": KV_HEADS, "sliding_window": 5,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True, "mlp_bias": False,
}  # fmt: skip
WINDOWS = [None, 5, None, 5, None, None, None, None]


def official_shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of `RAW`, written out anew from the published table."""
    E, N, R = 2 * HIDDEN, 16, 3
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.final_layernorm.weight": (HIDDEN,),
        "model.final_layernorm.bias": (HIDDEN,),
    }
    mamba: dict[str, tuple[int, ...]] = {
        "in_proj.weight": (2 * E, HIDDEN), "conv1d.weight": (E, 1, 4), "conv1d.bias": (E,),
        "x_proj.weight": (R + 2 * N, E), "dt_proj.weight": (E, R), "dt_proj.bias": (E,),
        "A_log": (E, N), "D": (E,), "out_proj.weight": (HIDDEN, E),
    }  # fmt: skip
    gated = {"in_proj.weight": (E, HIDDEN), "out_proj.weight": (HIDDEN, E)}
    maps: dict[str, tuple[int, ...]] = {"inner_cross_attn.subln.weight": (2 * HEAD_DIM,)}
    maps |= {f"inner_cross_attn.lambda_{x}": (HEAD_DIM,) for x in ("q1", "k1", "q2", "k2")}
    maps |= {"out_proj.weight": (HIDDEN, HIDDEN), "out_proj.bias": (HIDDEN,)}
    rows = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    attention = maps | {"Wqkv.weight": (rows, HIDDEN), "Wqkv.bias": (rows,)}
    cross = maps | {"Wqkv.weight": (HIDDEN, HIDDEN), "Wqkv.bias": (HIDDEN,)}
    kinds = [mamba, attention, mamba, attention, mamba, attention, gated, cross]
    for index, kind in enumerate(kinds):
        layer = f"model.layers.{index}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{layer}{norm}.{part}": (HIDDEN,) for part in ("weight", "bias")}
        shapes[f"{layer}mlp.fc1.weight"] = (2 * MLP, HIDDEN)
        shapes[f"{layer}mlp.fc2.weight"] = (HIDDEN, MLP)
        shapes |= {f"{layer}attn.{name}": shape for name, shape in kind.items()}
    return shapes


def is_wide(name: str) -> bool:
    return name.endswith("A_log") or ".lambda_" in name


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        name: (torch.randn(shape, generator=generator) * 0.1).to(
            torch.float32 if is_wide(name) else torch.bfloat16
        )
        for name, shape in official_shapes().items()
    }


@pytest.fixture
def folder(tensors: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    path = tmp_path / "official"
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(RAW))
    (path / "tokenizer_config.json").write_text("{}")
    return path


def tiny_official(**fields: Any) -> ModelConfig:
    """The configuration of `RAW`."""
    return official.parse(RAW).replace(**fields)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000])
def test_round_trip_gives_the_same_bytes(
    dtype: torch.dtype,
    max_shard_bytes: int,
    folder: Path,
    tensors: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    model = official.load(folder, dtype=dtype)
    config, raw = official.read(folder)
    assert model.config == config
    assert raw == RAW
    out = tmp_path / "again"
    official.save(out, model, torch.bfloat16, max_shard_bytes, raw, folder)
    assert json.loads((out / "config.json").read_text()) == RAW
    assert (out / "tokenizer_config.json").exists()
    again = {
        name: value for path in out.glob("*.safetensors") for name, value in load_file(path).items()
    }
    assert (len(list(out.glob("*.safetensors"))) > 1) == (max_shard_bytes < 10**9)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        assert again[name].shape == tensor.shape
        assert torch.equal(again[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_every_parameter_comes_from_its_tensor(
    folder: Path, tensors: dict[str, torch.Tensor]
) -> None:
    """Spot checks by hand of everything that is cut or reshaped, and of the dtypes."""
    model = official.load(folder, dtype=torch.bfloat16)
    ours = dict(model.named_parameters())
    joint = tensors["model.layers.3.attn.Wqkv.weight"]
    assert torch.equal(ours["blocks.3.mixer.q_proj.weight"], joint[:48])
    assert torch.equal(ours["blocks.3.mixer.kv_proj.weight"], joint[48:])
    bias = tensors["model.layers.5.attn.Wqkv.bias"]
    assert torch.equal(ours["blocks.5.mixer.kv_proj.bias"], bias[48:])
    conv = tensors["model.layers.4.attn.conv1d.weight"]
    assert torch.equal(ours["blocks.4.mixer.conv_weight"], conv[:, 0])
    D = ours["blocks.2.mixer.D"]
    assert D.dtype == torch.float32
    assert torch.equal(D, tensors["model.layers.2.attn.D"].float())
    assert torch.equal(ours["blocks.2.mixer.A_log"], tensors["model.layers.2.attn.A_log"])
    assert ours["blocks.7.mixer.q_proj.weight"].dtype == torch.bfloat16
    assert model.head.weight is model.embedding.weight
    assert not model.training
    used = {name for rule in key_map.rules(model.config) for name in rule.ours}
    assert used == ours.keys()


def test_splitting_and_joining_are_views_and_opposites(tensors: dict[str, torch.Tensor]) -> None:
    config = tiny_official()
    for rule in key_map.rules(config):
        tensor = tensors[rule.official]
        ours = key_map.to_ours(rule, tensor, config)
        storages = {part.untyped_storage().data_ptr() for part in ours}
        assert storages == {tensor.untyped_storage().data_ptr()}
        assert torch.equal(key_map.to_official(rule, ours), tensor)
        assert rule.shape(*(part.shape for part in ours)) == tensor.shape


def test_untied_heads(tmp_path: Path) -> None:
    model = LanguageModel(tiny_official(tie_embeddings=False)).eval()
    with torch.no_grad():
        model.head.weight.normal_()
    official.save(tmp_path / "model", model)
    assert "lm_head.weight" in load_file(tmp_path / "model" / "model.safetensors")
    loaded = loading.load_model(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded(random_ids(2, 9)), model(random_ids(2, 9)))


def test_the_released_configuration_is_written_as_published() -> None:
    published = {
        "architectures": ["Phi4FlashForCausalLM"], "model_type": "phi4flash",
        "attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "pad_token_id": 199999,
        "bos_token_id": 199999, "eos_token_id": 199999, "hidden_act": "silu", "hidden_size": 2560,
        "initializer_range": 0.02, "intermediate_size": 10240, "layer_norm_eps": 1e-5,
        "max_position_embeddings": 262144, "mb_per_layer": 2, "num_attention_heads": 40,
        "num_hidden_layers": 32, "num_key_value_heads": 20, "sliding_window": 512,
        "tie_word_embeddings": True, "use_cache": True, "mlp_bias": False, "lm_head_bias": False,
        "vocab_size": 200064,
    }  # fmt: skip
    config = presets.phi4_mini_flash()
    assert official.describe(config) == published
    assert official.parse(published) == config


@pytest.mark.parametrize(
    "spelling",
    [
        {"sliding_window": WINDOWS},
        {"sliding_window": [5 if window else 4 if i in (2, 6) else None
                            for i, window in enumerate(WINDOWS)]},  # no attention, no matter
        {"layer_types": ["mamba", "sliding_attention"] * 2 + ["mamba", "full_attention"] * 2},
        {"sliding_window": WINDOWS,
         "layer_types": ["linear_attention", "sliding_attention"] * 2
         + ["linear_attention", "full_attention"] * 2},
        {"mamba_dt_rank": "auto"},
        {"mamba_dt_rank": 3, "mamba_d_state": 16, "mamba_conv_bias": True},
        {"torch_dtype": None, "dtype": "float16"},
        {"rope_theta": 10000.0, "transformers_version": "4.46.1", "resid_pdrop": 0.1},
    ],
)  # fmt: skip
def test_spellings_of_the_same(spelling: dict[str, Any]) -> None:
    assert official.parse(RAW | spelling) == official.parse(RAW)


@pytest.mark.parametrize("field", [{"dt_rank": 7}, {"d_state": 5}, {"d_conv": 3}, {"expand": 3}])
def test_other_state_sizes_survive(field: dict[str, int]) -> None:
    config = tiny_official(**field)
    assert config != tiny_official()
    assert official.parse(official.describe(config)) == config


def test_saving_corrects_entries_that_no_longer_hold(folder: Path, tmp_path: Path) -> None:
    extra = RAW | {"sliding_window": WINDOWS, "mamba_d_state": 9, "mamba_dt_rank": 2}
    model = LanguageModel(tiny_official(window=4))
    official.save(tmp_path / "out", model, config_extra=extra)
    config, raw = official.read(tmp_path / "out")
    assert config == model.config
    assert raw["eos_token_id"] == [3, 5]
    assert raw["max_position_embeddings"] == 262144 or raw["max_position_embeddings"] == 777
    assert raw["torch_dtype"] == "float32"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "phi3"}, "model_type = 'phi3': Phi-4-mini and its relatives are plain"),
        ({"model_type": "llama"}, "'llama': a plain Transformer"),
        ({"model_type": "sambay"}, "that is sambay's own format; load it with"),
        ({"model_type": "mamba"}, "sambay reads 'sambay' and 'phi4flash'"),
        ({"model_type": ...}, "there is no model_type"),
        ({"sliding_window": ...}, "sliding_window is missing, and the default"),
        ({"vocab_size": ...}, "vocab_size is missing"),
        ({"num_key_value_heads": ...}, "num_key_value_heads is missing"),
        ({"num_hidden_layers": 10}, "num_hidden_layers = 10; it must be a positive multiple of 4"),
        ({"mb_per_layer": 1}, "mb_per_layer = 1; only 2"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'; only 'silu'"),
        ({"mlp_bias": True}, "mlp_bias = True; only False"),
        ({"lm_head_bias": True}, "lm_head_bias = True"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps = 1e-06; only 1e-05"),
        ({"num_attention_heads": 7}, "num_attention_heads = 7 does not divide hidden_size = 48"),
        ({"hidden_size": "48"}, "hidden_size = '48'; it must be a whole number"),
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, "num_kv_heads = 3 is odd"),
        ({"sliding_window": None}, "sliding_window = None; layer 1 has a window"),
        ({"sliding_window": WINDOWS[:-1]}, "sliding_window has 7 entries for 8 layers"),
        ({"sliding_window": [None] * 8}, r"sliding_window\[1\] = None; layer 1 has a window"),
        ({"sliding_window": [None, 5, None, 6, *[None] * 4]}, r"sliding_window\[3\] = 6; layer 3"),
        ({"sliding_window": [*WINDOWS[:5], 5, None, None]}, r"\[5\] = 5; layer 5 attends to ev"),
        ({"layer_types": ["sliding_attention"] * 8}, r"layer_types\[5\] = 'sliding_attention'"),
        ({"layer_types": ["full_attention"] * 8}, r"layer_types\[1\] = 'full_attention'; layer 1"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries"),
    ],
)
def test_configs_of_something_else(change: dict[str, Any], message: str, folder: Path) -> None:
    values = {name: value for name, value in (RAW | change).items() if value is not ...}
    with pytest.raises(ConfigError, match=message) as caught:
        official.parse(values)
    assert "\n" not in str(caught.value)
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointMismatch, match=r"config\.json"):
        official.load(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tiny_config("sambay"), "model.norm = rms does not fit Phi4FlashForCausalLM: it has Lay"),
        (tiny_config("mambay"), r"model.layer_pattern = 5xM F G C .* '2x\(M S\) M F G C'"),
        (tiny_official(layer_pattern="M S M F C"), "layer_pattern .* layers are a multiple of 4"),
        (tiny_official(attention_variant="softmax"), "attention_variant = softmax"),
        (tiny_official(attention_bias=False), "attention_bias = False"),
        (tiny_official(position="rope"), "position = rope"),
        (tiny_official(memory_source="attention"), "memory_source = attention"),
        (tiny_official(residual_multiplier=0.25), "residual_multiplier = 0.25 .*fold them into"),
        (tiny_official(logit_multiplier=2), "logit_multiplier = 2.0 .*fold them into"),
        (tiny_official(embedding_multiplier=2), "embedding_multiplier = 2.0 .*fold"),
        (tiny_official(attention_scale=0.5), r"attention_scale = 0.5 .*1/sqrt\(head_dim\)"),
        (tiny_official(head_dim=8, attention_scale=8**-0.5), "head_dim = 8"),
        (tiny_official(norm_eps=1e-6), "norm_eps = 1e-06"),
        (tiny_config("sambay-2"), "recurrent_kind = mamba2 .*recurrent layers are Mamba-1"),
        (tiny_official(gated_memory="normalised"), "gated_memory = normalised .*no norm"),
    ],
)
def test_models_that_do_not_fit_are_refused_with_the_reason(
    config: ModelConfig, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        official.describe(config)
    with pytest.raises(ConfigError, match=message):
        official.save(tmp_path / "out", LanguageModel(config))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "misses tensor 'model.layers.4.attn.D'; it belongs to another config"),
        ("left over", "has 2 unknown tensors 'model.layers.9.attn.D', 'x'"),
        ("head", "unknown tensor 'lm_head.weight'; .*set tie_word_embeddings to false"),
        ("shape", r"has 'model.layers.0.attn.conv1d.weight' of shape \(96, 4\) where \(96, 1, 4\)"),
        (
            "depth",
            r"fit layer_pattern = '2x\(M S\) M F G C' \(configured: '3x",
        ),
        ("vocabulary", r"'model.embed_tokens.weight' .*fit vocab_size = 61 \(configured: 70\)"),
    ],
)
def test_tensors_that_do_not_fit(
    damage: str, message: str, folder: Path, tensors: dict[str, torch.Tensor]
) -> None:
    if damage == "missing":
        del tensors["model.layers.4.attn.D"]
    if damage == "left over":
        tensors |= {"model.layers.9.attn.D": torch.zeros(1), "x": torch.zeros(1)}
    if damage == "head":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if damage == "shape":
        conv = "model.layers.0.attn.conv1d.weight"
        tensors[conv] = tensors[conv].squeeze(1)
    change = {"depth": {"num_hidden_layers": 12}, "vocabulary": {"vocab_size": 70}}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(RAW | change.get(damage, {})))
    with pytest.raises(CheckpointMismatch, match=message) as caught:
        official.load(folder)
    assert "\n" not in str(caught.value)


def test_loading_tells_the_formats_apart(folder: Path, tmp_path: Path) -> None:
    model = tiny_model("sambay+da", dtype=torch.float32)
    save_model_folder(tmp_path / "native", model)
    assert loading.read_config(tmp_path / "native") == model.config
    assert loading.load_model(str(tmp_path / "native")).config == model.config
    assert loading.read_config(folder) == tiny_official()
    mine = official.load(folder, dtype=torch.bfloat16)
    theirs = loading.load_model(folder, torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(mine(random_ids(1, 8)), theirs(random_ids(1, 8)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "model does not exist; give a model folder"),
        ({}, "model is empty; give a folder"),
        ({"model.safetensors": "x"}, "model has no config.json"),
        ({"config.json": '{"model_type": "jamba"}'}, "config.json: model_type = 'jamba'"),
        ({"config.json": '{"model": {}, "data": {}}'}, "there is no model_type; .*run directory"),
        ({"config.json": "{"}, "config.json cannot be read"),
        ({"config.json": '{"model_type": "sambay"}'}, "config.json: model.layer_pattern: missing"),
    ],
)
def test_loading_explains_what_is_no_model(
    content: dict[str, str] | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    if content is not None:
        path.mkdir()
        for name, text in content.items():
            (path / name).write_text(text)
    for call in (loading.load_model, loading.read_config):
        with pytest.raises(CheckpointMismatch, match=message) as caught:
            call(path)
        assert "\n" not in str(caught.value)


def test_a_download_cache_is_resolved_for_the_user(folder: Path, tmp_path: Path) -> None:
    """Its files are links; the snapshot itself loads."""
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    with pytest.raises(CheckpointMismatch, match=r"is a download cache; give .*snapshots/0123$"):
        loading.load_model(snapshot.parent.parent)
    assert loading.load_model(snapshot).config == tiny_official()


def test_loading_a_file(folder: Path) -> None:
    with pytest.raises(CheckpointMismatch, match="is a file; give the folder that holds it"):
        loading.load_model(folder / "model.safetensors")
