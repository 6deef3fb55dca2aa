"""A tiny official folder with a tokenizer in the shape of GPT-4o's, to run commands on."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from sambay.hf import official
from tests.hf import gpt4o
from tests.tiny import tiny_model

END_IDS = [gpt4o.CONTROLS["<|end|>"], gpt4o.CONTROLS["<|endoftext|>"]]


def write_official(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The folder, as downloaded: with generation_config.json and without a chat template."""
    model = tiny_model(
        "sambay+da", dtype=torch.float32, vocab_size=gpt4o.SIZE, hidden_size=48, norm="layer",
        attention_bias=True, parametrization="standard", attention_scale=6**-0.5,
    )  # fmt: skip
    official.save(folder, model.to(dtype))
    gpt4o.write(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END_IDS}))
    return folder
