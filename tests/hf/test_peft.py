"""LoRA through PEFT: what the target lists match, that every module learns, merging and saving."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sambay.errors import ConfigError
from sambay.hf.lora import TARGETS, target_modules
from sambay.layers.attention import CrossAttention, SelfAttention
from sambay.layers.gated_delta import GatedDelta
from sambay.layers.gated_memory import GatedMemoryUnit
from sambay.layers.mamba import Mamba
from sambay.layers.mamba2 import Mamba2
from sambay.layers.mlp import SwiGLU
from sambay.model import LanguageModel
from tests.tiny import NAMES, tiny_config

pytest.importorskip("transformers", reason="the classes of transformers are not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

from tests.hf.tiny_hf import OFFICIAL, fresh_pair  # noqa: E402

CLASSES = {
    "mamba": Mamba,
    "mamba2": Mamba2,
    "gated_delta": GatedDelta,
    "attention": SelfAttention,
    "cross_attention": CrossAttention,
    "gated_memory": GatedMemoryUnit,
    "mlp": SwiGLU,
}
LAYERS = tiny_config("sambay+da").layers
FLOAT32 = ("A_log", "D", "dt_bias", "lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


def native(name: str = "sambay+da") -> Any:
    return fresh_pair(name)[1]


def official() -> Any:
    return fresh_pair(OFFICIAL)[1]


def adapted(model: Any, target: Any, **fields: Any) -> Any:
    """The model with rank-2 adapters whose second factor is not zero, as after a step."""
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=target, **fields)
    adapted = peft.get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return adapted


def token_ids() -> Tensor:
    return torch.randint(0, 61, (2, 19), generator=torch.Generator().manual_seed(0))


def replaced(model: Any) -> set[str]:
    """The paths of the modules that got an adapter, as the model itself names them."""
    found = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    return {name.removeprefix("base_model.model.") for name in found}


def linear_layers(model: nn.Module, kind: str) -> set[str]:
    """The paths of the linear layers inside mixers of exactly one class."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if type(module) is CLASSES[kind]
        for name, inner in module.named_modules()
        if isinstance(inner, nn.Linear)
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_published_lists_are_the_linear_layers_of_each_kind(name: str) -> None:
    config = tiny_config(name)
    with torch.device("meta"):
        model = LanguageModel(config)
    everything = [path for path, _ in model.named_modules()]
    for kind in TARGETS:
        layers = linear_layers(model, kind)
        if not layers:
            with pytest.raises(ConfigError, match=f"no {kind} layers.*it has .*mlp"):
                target_modules(config, [kind])
            continue
        assert {path.rsplit(".", 1)[1] for path in layers} == set(TARGETS[kind])
        pattern = re.compile(target_modules(config, [kind]))
        assert {path for path in everything if pattern.fullmatch(path)} == layers
        assert pattern.fullmatch("model." + min(layers)), "the same path below a wrapper"


@pytest.mark.parametrize("make", [native, official])
def test_the_default_is_every_linear_layer_but_the_head(make: Any) -> None:
    model = make()
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)} - {
        "lm_head"
    }
    assert replaced(adapted(make(), target_modules(model.config))) == linear
    assert replaced(adapted(make(), "all-linear")) == linear
    assert replaced(adapted(make(), target_modules(model.config, ["mamba.out_proj"]))) == {
        path for path in linear if path in linear_layers(model, "mamba") and "out_proj" in path
    }


def test_a_choice_that_cannot_work_says_what_can() -> None:
    config = tiny_config("sambay+da")
    with pytest.raises(ConfigError, match=r"'gated_memroy' is no kind .*'gated_memory'"):
        target_modules(config, ["gated_memroy"])
    with pytest.raises(ConfigError, match=r"mamba has no such module .*in_proj"):
        target_modules(config, ["mamba.in_prj"])
    with pytest.raises(ConfigError, match="empty"):
        target_modules(config, [])
    assert target_modules(config, "mlp") == target_modules(config, ["mlp"])


def test_peft_refuses_a_target_that_matches_nothing() -> None:
    with pytest.raises(ValueError, match="not found in the base model"):
        adapted(native(), ["gmu_proj"])
    foreign = target_modules(tiny_config("sambay"), ["mamba.in_proj"])
    with pytest.raises(ValueError, match="not found in the base model"):
        adapted(native("transformer++"), foreign)


CHECKPOINTING = {
    "plain": None,
    "checkpointed": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
}


def gradients(model: Any, checkpointing: dict[str, bool] | None) -> dict[str, Tensor]:
    """The gradient of every adapter parameter for a language-model loss."""
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(checkpointing)
    model.train()
    ids = token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trained), "everything else is frozen"
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    return trained


@pytest.mark.parametrize("way", CHECKPOINTING)
@pytest.mark.parametrize("make", [native, official])
def test_every_listed_module_learns(make: Any, way: str) -> None:
    model = adapted(make(), target_modules(make().config))
    found = gradients(model, CHECKPOINTING[way])
    factors = [name for name in found if "lora_A" in name or "lora_B" in name]
    assert len(factors) == len(found) == 2 * len(replaced(model)) > 80
    for name, gradient in found.items():
        assert torch.isfinite(gradient).all(), name
        assert gradient.abs().max() > 1e-9, name
    if CHECKPOINTING[way] is not None:
        plain = adapted(make(), target_modules(make().config))
        plain.load_state_dict(model.state_dict())
        for name, gradient in gradients(plain, None).items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("way", CHECKPOINTING)
@pytest.mark.parametrize(
    ("publisher", "target"), [("M", "mamba.in_proj"), ("F", "attention.kv_proj")]
)
def test_publishers_learn_from_their_readers(publisher: str, target: str, way: str) -> None:
    """Where a layer's own output is zero, all its gradient comes from layers that read from it."""
    model = native()
    read_from = {layer.memory_from if publisher == "M" else layer.kv_from for layer in LAYERS}
    (index,) = read_from - {None}
    nn.init.zeros_(model.model.blocks[index].mixer.out_proj.weight)
    model = adapted(model, target_modules(model.config, [target]))
    found = gradients(model, CHECKPOINTING[way])
    learned = [gradient for name, gradient in found.items() if f"blocks.{index}.mixer" in name]
    assert len(learned) == 2
    assert all(gradient.abs().max() > 1e-9 for gradient in learned)


@pytest.mark.parametrize("kind", TARGETS)
def test_each_kind_learns_alone(kind: str) -> None:
    """The gradient must reach it through frozen layers, gated memory and shared keys."""
    model = native({"mamba2": "sambay-2", "gated_delta": "s-gdny"}.get(kind, "sambay+da"))
    layers = linear_layers(model, kind)
    model = adapted(model, target_modules(model.config, [kind]))
    assert replaced(model) == layers
    found = gradients(model, None)
    assert len(found) == 2 * len(layers)
    assert all(gradient.abs().max() > 1e-9 for gradient in found.values())


@pytest.mark.parametrize("make", [native, official])
def test_merging_and_casting(make: Any) -> None:
    base = make()
    original = {name: p.clone() for name, p in base.named_parameters()}
    before = base(token_ids()).logits
    model = adapted(base, target_modules(base.config))
    expected = model(token_ids()).logits
    assert (expected - before).abs().max() > 1e-3, "the adapters must do something"
    merged = model.merge_and_unload()
    assert type(merged) is type(base)
    torch.testing.assert_close(merged(token_ids()).logits, expected, rtol=1e-4, atol=1e-5)
    merged = merged.to(torch.bfloat16)
    kept = {name for name, p in merged.named_parameters() if p.dtype is torch.float32}
    assert kept == {name for name in original if name.rsplit(".", 1)[1] in FLOAT32}
    for name in kept:
        assert torch.equal(merged.get_parameter(name), original[name]), name
    assert merged.lm_head.weight is merged.model.embedding.weight


def test_a_bfloat16_base_keeps_its_float32_parameters_under_an_adapter() -> None:
    model = adapted(native().to(torch.bfloat16), "all-linear")
    for name, parameter in model.named_parameters():
        wide = ".lora_" in name or name.rsplit(".", 1)[1] in FLOAT32
        assert parameter.dtype is (torch.float32 if wide else torch.bfloat16), name
    found = gradients(model, None)
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    merged = model.merge_and_unload()
    assert merged.model.blocks[0].mixer.in_proj.weight.dtype is torch.bfloat16
    assert merged.model.blocks[0].mixer.A_log.dtype is torch.float32


@pytest.mark.parametrize("make", [native, official])
def test_save_and_load(make: Any, tmp_path: Path) -> None:
    base = make()
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, target_modules(base.config))
    model.save_pretrained(tmp_path / "adapter")
    expected = model(token_ids()).logits
    fresh = type(base).from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(token_ids()).logits, expected, rtol=0, atol=0)
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = type(base).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(token_ids()).logits, expected, rtol=1e-4, atol=1e-5)


def test_an_adapted_model_generates() -> None:
    model = adapted(native(), "all-linear")
    ids = token_ids()[:, :7]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # padding on the left
    both = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    alone = model.generate(
        input_ids=ids[:1, 3:], attention_mask=mask[:1, 3:], max_new_tokens=5, do_sample=False
    )
    assert torch.equal(both[0, 7:], alone[0, 4:])
