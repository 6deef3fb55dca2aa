"""Models with int8 and int4 weights: steps are recorded, and give what torchao's products give."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sambay
from sambay.errors import ConfigError, MissingPackage
from sambay.generate import Engine, Request, SlotEngine
from sambay.generate.decode_step import DecodeStep
from sambay.hf.quantisation import WEIGHTS, quantise
from sambay.layers import projection, quantised
from sambay.layers.quantised import held_tensors
from sambay.model import LanguageModel
from sambay.model.slots import SlotCache
from sambay.ops.native.library import why_unavailable
from tests.tiny import random_ids, tiny_model

quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
pytestmark = pytest.mark.usefixtures("plenty")
needs_kernels = pytest.mark.skipif(why_unavailable() is not None, reason="no C++ kernels here")
# 8 heads of 8: groups of 32 fit every row but those of the time steps.
SHAPE: dict[str, Any] = {"hidden_size": 64, "head_dim": 8, "intermediate_size": 96}
NAMES = ["sambay+da", "transformer++"]


def model_of(name: str, weights: str | None, dtype: torch.dtype = torch.float32) -> LanguageModel:
    model = tiny_model(name, dtype=dtype, **SHAPE)
    return model if weights is None else quantise(model, weights)


def requests() -> list[Request]:
    return [
        Request(random_ids(1, 1 + 3 * i % 8, seed=i)[0].tolist(), 2 + 4 * i % 7) for i in range(7)
    ]


def by_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "multiply_rows", lambda *given: None)


@torch.inference_mode()
def logits_of(model: LanguageModel, *, capture: bool, steps: int = 4) -> Tensor:
    """Of some decode steps of two slots, (steps, 2, V), the tokens given."""
    cache = SlotCache(model, 2, 16, model.head_weight.dtype)
    step = DecodeStep(model, cache, capture=capture)
    assert (step.why_not_captured is None) == capture
    for slot, length in enumerate((3, 6)):
        model(random_ids(1, length, seed=length), cache=cache.empty(slot), outputs="last")
        cache.set_length(slot, length)
    found = []
    for token in range(steps):
        step.tokens_B[:2] = torch.tensor([token, token + 5])
        found.append(step.run(2).clone())
    return torch.stack(found)


def distance(logits: Tensor, expected: Tensor) -> float:
    return ((logits - expected).norm() / expected.norm()).item()


def dequantised(model: LanguageModel) -> LanguageModel:
    """The model in float32 with the weights that the integers and their scales stand for."""
    model = copy.deepcopy(model)
    for module in linears(model):
        if type(module.weight) is not nn.Parameter:
            integers, scale_FG = held_tensors(module.weight)
            scale_FD = scale_FG.float().repeat_interleave(
                integers.shape[1] // scale_FG.shape[1], dim=1
            )
            module.weight = nn.Parameter(integers.float() * scale_FD)
    return model.float()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", NAMES)
def test_recorded_steps_give_the_logits_of_torchao(name, weights, dtype, monkeypatch) -> None:
    model = model_of(name, weights, dtype)
    recorded, plain = logits_of(model, capture=True), logits_of(model, capture=False)
    assert torch.equal(recorded, plain)
    by_torchao(monkeypatch)
    own = logits_of(model, capture=False)
    assert not torch.equal(recorded, own)  # or both came by the same way
    if dtype is torch.float32:
        assert distance(recorded, own) < 1e-5
    else:  # both are rounded in every layer, torchao's also in its weights
        exact = logits_of(dequantised(model), capture=False)
        assert distance(recorded, exact) < max(1.1 * distance(own, exact), 0.01)
    assert distance(recorded, logits_of(model_of(name, None, dtype), capture=False)) > 1e-3


@needs_kernels
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", NAMES)
def test_slots_and_the_engine_write_the_same_tokens(name, weights, monkeypatch) -> None:
    model = model_of(name, weights)
    engine = SlotEngine(model, slots=2, capacity=16)
    assert engine.step_mode == "captured"
    tokens = [done.tokens for done in engine.generate(requests())]
    assert tokens == [done.tokens for done in Engine(model).generate(requests())]
    by_torchao(monkeypatch)
    assert tokens == [done.tokens for done in Engine(model).generate(requests())]
    exact = Engine(model_of(name, None)).generate(requests())
    if weights == "int4":  # int8 moves hardly a token of a model this small
        assert tokens != [done.tokens for done in exact]


@needs_kernels
def test_only_what_is_read_first_is_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second engine, another width and a replay convert nothing again."""
    calls: list[int] = []
    pack: Callable[[Tensor], Tensor] = quantised.pack_int4
    monkeypatch.setattr(quantised, "pack_int4", lambda x: calls.append(1) or pack(x))
    model = model_of("transformer++", "int4")
    SlotEngine(model, slots=2, capacity=16).generate(requests())
    matrices = sum(type(module.weight) is not nn.Parameter for module in linears(model))
    assert len(calls) == matrices > 0
    SlotEngine(model, slots=3, capacity=16).generate(requests())
    assert len(calls) == matrices


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("module", ["x_proj", "dt_proj"])
def test_quantised_maps_inside_a_mamba_step(module: str, monkeypatch) -> None:
    """Nobody has to quantise them; who does gets plain steps and the right numbers."""
    model = tiny_model("sambay", dtype=torch.float32, **SHAPE)
    quantization.quantize_(
        model,
        quantization.Int8WeightOnlyConfig(),
        filter_fn=lambda part, name: isinstance(part, nn.Linear) and name.endswith(module),
    )
    engine = SlotEngine(model, slots=2, capacity=16)
    assert engine.step_mode.startswith("plain")
    logits = logits_of(model, capture=False)
    by_torchao(monkeypatch)
    torch.testing.assert_close(logits, logits_of(model, capture=False), rtol=1e-4, atol=1e-5)


def test_without_kernels_torchao_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("transformer++", "int8")
    own = Engine(model).generate(requests())
    monkeypatch.setattr("sambay.layers.quantised.serves", lambda x: "not here")
    engine = SlotEngine(model, slots=2, capacity=16)
    assert engine.step_mode.startswith("plain")
    assert [c.tokens for c in engine.generate(requests())] == [c.tokens for c in own]


def test_what_is_quantised() -> None:
    model = tiny_model("sambay", dtype=torch.bfloat16, **SHAPE)
    before = model.blocks[0].get_parameter("mixer.A_log").clone()
    assert sambay.quantise(model, "int4", group_size=64) is model
    kept = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module.weight) is nn.Parameter
    }
    # Rows of 96 are no whole number of groups; the head is the embedding.
    assert {name.rsplit(".", 2)[-2:][0] for name in kept if "mlp" in name} == {"mlp"}
    assert {name.rsplit(".", 1)[-1] for name in kept if "mixer" in name} == {"x_proj", "dt_proj"}
    assert model.head_weight is model.embedding.weight
    assert torch.equal(model.blocks[0].get_parameter("mixer.A_log"), before)


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ("int3", {}, "weights = 'int3' is unknown; use int8 or int4"),
        ("int4", {"group_size": 0}, "group_size = 0 is no multiple of 32"),
        ("int4", {"group_size": 48}, "group_size = 48 is no multiple of 32"),
        ("int4", {"group_size": 256}, "group_size = 256 divides no row to quantise"),
    ],
)
def test_mistakes(weights: str, options: dict[str, int], message: str) -> None:
    model = tiny_model("transformer++", dtype=torch.float32, **SHAPE)
    with pytest.raises(ConfigError, match=message):
        quantise(model, weights, **options)
    assert all(type(module.weight) is nn.Parameter for module in linears(model))


def test_quantising_twice_is_refused() -> None:
    model = model_of("transformer++", "int8")
    with pytest.raises(ConfigError, match=r"blocks\.0\..* holds Int8Tensor already"):
        quantise(model, "int4")


def test_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("transformer++", dtype=torch.float32, **SHAPE)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(MissingPackage, match=r"torchao.*sambay\[finetune\]"):
        quantise(model, "int8")


def test_slots_refuse_requests_after_quantised_weights_were_replaced_or_changed() -> None:
    for change in ("replace", "scale"):
        model = model_of("transformer++", "int8")
        slots = SlotEngine(model, slots=1, capacity=16)
        slots.submit(requests()[0])
        linear: Any = model.blocks[0].mlp.out_proj
        with torch.no_grad():
            if change == "replace":
                linear.weight = copy.deepcopy(linear.weight)
            else:
                held_tensors(linear.weight)[1].mul_(2)
        with pytest.raises(ConfigError, match="weights changed"):
            slots.submit(requests()[1])
