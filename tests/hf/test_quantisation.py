"""Loading with int8 and int4 weights through torchao, natively and from official folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sambay.errors import ConfigError
from sambay.hf.lora import target_modules
from sambay.hf.quantisation import filter_fn, modules_to_not_convert

pytest.importorskip("transformers", reason="the classes of transformers are not installed")
quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

from transformers import AutoConfig, AutoModelForCausalLM, TorchAoConfig  # noqa: E402

from tests.hf.tiny_hf import OFFICIAL, tiny_native, twin  # noqa: E402

# 8 heads of 8 in a hidden size of 64: groups of 32 fit every row but those of the time steps.
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "head_dim": 8,
    "attention_scale": 8**-0.5,
    "intermediate_size": 96,
}
GROUP = 32
FLOAT32 = {"A_log", "D", "dt_bias", "lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"}
NATIVE = "sambay+da"


def int8() -> Any:
    return quantization.Int8WeightOnlyConfig()


def int4() -> Any:
    group = quantization.PerGroup(GROUP)
    return quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=group)


def packed_int4() -> Any:
    module = pytest.importorskip(
        "torchao.prototype.quantization.int4", reason="no packed 4-bit kernels for the CPU"
    )
    return module.PrototypeInt4WeightOnlyConfig(group_size=GROUP)


# The largest relative error of the logits (2-norm) seen here is about half of these.
SCHEMES: dict[str, tuple[Callable[[], Any], int | None, float]] = {
    "int8": (int8, None, 0.04),
    "int4": (int4, GROUP, 0.4),
    "packed int4": (packed_int4, GROUP, 0.4),
}


def model_of(layout: str) -> Any:
    return twin(tiny_native(layout, **SHAPE), official_layout=layout == OFFICIAL)


def token_ids() -> Tensor:
    return torch.randint(2, 61, (2, 21), generator=torch.Generator().manual_seed(0))


def relative_error(logits: Tensor, expected: Tensor) -> float:
    return ((logits.float() - expected).norm() / expected.norm()).item()


def load(folder: Path, scheme: str, dtype: torch.dtype = torch.float32) -> Any:
    make, group, _ = SCHEMES[scheme]
    kept = modules_to_not_convert(AutoConfig.from_pretrained(folder), group)
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        quantization_config=TorchAoConfig(make(), modules_to_not_convert=kept),
    )


def quantised(model: nn.Module) -> set[str]:
    """The linear layers whose weight is no plain tensor any more."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter
    }


def wanted(model: nn.Module) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.rsplit(".", 1)[1:] not in (["x_proj"], ["dt_proj"])
        and name != "lm_head"
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for layout in (NATIVE, OFFICIAL):
        made[layout] = tmp_path_factory.mktemp("models") / layout
        model_of(layout).save_pretrained(made[layout])
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [NATIVE, OFFICIAL])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_loading_quantised(
    folders: dict[str, Path], scheme: str, layout: str, dtype: torch.dtype
) -> None:
    exact = model_of(layout)
    expected = exact(token_ids()).logits
    model = load(folders[layout], scheme, dtype)
    assert quantised(model) == wanted(exact)
    assert model.lm_head.weight is model.model.embedding.weight
    originals = dict(exact.named_parameters())
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[1] in FLOAT32:
            assert parameter.dtype is torch.float32, name
            assert torch.equal(parameter, originals[name]), name
    with torch.no_grad():
        error = relative_error(model(token_ids()).logits, expected)
    assert 1e-4 < error < SCHEMES[scheme][2]
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    ids = token_ids()[:, :6]
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    assert cached.shape[1] > 6


def test_loading_in_bfloat16(folders: dict[str, Path]) -> None:
    for layout, folder in folders.items():
        expected = model_of(layout)(token_ids()).logits
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        for name, parameter in model.named_parameters():
            narrow = name.rsplit(".", 1)[1] not in FLOAT32
            assert parameter.dtype is (torch.bfloat16 if narrow else torch.float32), name
        assert 1e-4 < relative_error(model(token_ids()).logits, expected) < 0.03


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantising_a_loaded_model_is_the_same(folders: dict[str, Path], scheme: str) -> None:
    make, group, _ = SCHEMES[scheme]
    for layout, folder in folders.items():
        model = model_of(layout)
        quantization.quantize_(model, make(), filter_fn=filter_fn(model.config, group))
        assert quantised(model) == wanted(model)
        loaded = load(folder, scheme)
        with torch.no_grad():
            assert torch.equal(model(token_ids()).logits, loaded(token_ids()).logits)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_quantised_native_folder_loads_again(
    folders: dict[str, Path], scheme: str, tmp_path: Path
) -> None:
    model = load(folders[NATIVE], scheme, torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert quantised(again) == quantised(model)
    assert again.model.blocks[0].mixer.A_log.dtype is torch.float32
    with torch.no_grad():
        assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)


def test_a_quantised_official_folder_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no quantised form; convert"):
        load(folders[OFFICIAL], "int8").save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_casting_after_quantising_keeps_the_float32_parameters() -> None:
    model = model_of(NATIVE)
    before = model.model.blocks[0].mixer.A_log.clone()
    quantization.quantize_(model, int8(), filter_fn=filter_fn(model.config))
    model.to(torch.bfloat16)
    assert torch.equal(model.model.blocks[0].mixer.A_log, before)
    assert model.model.embedding.weight.dtype is torch.bfloat16


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_adapters_learn_on_a_quantised_model(folders: dict[str, Path], scheme: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = load(folders[NATIVE], scheme, torch.bfloat16)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=target_modules(model.config))
    adapted = peft.get_peft_model(model, lora).train()
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=token_ids(), labels=token_ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(bool(p.any()) for name, p in adapted.named_parameters() if "lora_B" in name)


def test_groups_that_do_not_fit(folders: dict[str, Path]) -> None:
    """What no group divides is kept; a size that divides nothing is an error that says so."""
    config = AutoConfig.from_pretrained(folders[NATIVE])
    model = model_of(NATIVE)
    quantises = filter_fn(config, 64)
    names = {name for name, module in model.named_modules() if quantises(module, name)}
    assert names == {name for name in wanted(model) if "mlp.out_proj" not in name}  # rows of 96
    with pytest.raises(ConfigError, match=r"group_size = 256 divides no row .*4, 64, 96, 128"):
        modules_to_not_convert(config, 256)
