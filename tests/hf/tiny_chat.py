"""A byte tokenizer with Phi's chat template, and model folders that use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.hf.tiny_hf import OFFICIAL, tiny_native, twin

CONTROLS = ("<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
# Phi's template; the generation marks say which tokens are answers and print nothing.
TEMPLATE = (Path(__file__).parents[2] / "examples" / "finetune" / "phi4.jinja").read_text(
    encoding="utf-8"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and the control tokens of Phi."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: index for index, name in enumerate([*CONTROLS, *alphabet])}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    inner.decoder = decoders.ByteLevel()  # pyright: ignore
    inner.add_special_tokens(list(CONTROLS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        padding_side="left",
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def chat_model(name: str = "sambay+da", **fields: Any) -> Any:
    """A tiny model with the tokenizer's vocabulary, ready to train."""
    fields = {"vocab_size": len(chat_tokenizer())} | fields
    model = twin(tiny_native(name, **fields), official_layout=name == OFFICIAL)
    model.config.eos_token_id = model.generation_config.eos_token_id = [0, 1]
    model.config.pad_token_id = model.generation_config.pad_token_id = 0
    return model


def chat_folder(folder: Path, name: str = "sambay+da") -> Path:
    """A model folder with tokenizer and template, as the recipes take it."""
    chat_model(name).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder
