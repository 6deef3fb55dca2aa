"""LoRA adapters as PEFT writes them, on all projections of a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from sambay.generate.reference import reference_generate
from sambay.model.weights_writer import plan_tensor, write_file
from tests.serve.served_models import NEEDS_VLLM, Engine, served

pytestmark = [NEEDS_VLLM, pytest.mark.slow, pytest.mark.timeout(1800)]
RANK, ALPHA, NEW = 4, 8, 8
TARGETS = ("in_proj", "out_proj", "q_proj", "kv_proj", "x_proj", "dt_proj")


def write_adapter(folder: Path, model: nn.Module) -> None:
    """An adapter of all projections; `model` becomes what it is with the adapter merged in."""
    generator = torch.Generator().manual_seed(7)
    tensors = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] not in TARGETS:
            continue
        assert isinstance(module, nn.Linear)
        rows, columns = module.weight.shape
        down = torch.randn(RANK, columns, generator=generator) * 0.2
        up = torch.randn(rows, RANK, generator=generator) * 0.2
        base = f"base_model.model.model.{name}"
        tensors += [(f"{base}.lora_A.weight", down), (f"{base}.lora_B.weight", up)]
        module.weight.data += ALPHA / RANK * up @ down
    assert tensors
    folder.mkdir()
    write_file(folder / "adapter_model.safetensors", [plan_tensor(n, t) for n, t in tensors])
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS),
        "bias": "none", "base_model_name_or_path": "tiny", "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_an_adapter_is_what_merging_it_would_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also behind a cached prompt. No batch has requests without it: see the refusal on CPUs."""
    from sambay.serve import verification

    monkeypatch.setattr(verification, "is_cpu", lambda: False)
    model = served("sambay+da", tmp_path / "model", new=NEW)
    write_adapter(tmp_path / "adapter", model.model)
    adapted = [reference_generate(model.model, prompt, NEW)[0] for prompt in model.prompts]
    assert adapted != model.tokens
    engine = Engine(
        model.folder, enable_lora=True, max_lora_rank=8, max_loras=1, enable_prefix_caching=True
    )
    try:
        from vllm.lora.request import LoRARequest

        assert engine.tokens(model.prompts, NEW) == model.tokens
        request = LoRARequest("tiny", 1, str(tmp_path / "adapter"))
        for _ in range(2):
            assert engine.tokens(model.prompts, NEW, lora_request=request) == adapted
        assert engine.tokens(model.prompts, NEW) == model.tokens
    finally:
        engine.close()
