"""The tiny models of `tests.tiny` as transformers' classes, and a tokenizer of their vocabulary."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sambay.hf import official
from sambay.hf.configuration import Phi4FlashConfig, SambaYConfig
from sambay.hf.modeling import Phi4FlashForCausalLM, SambaYForCausalLM
from sambay.model import LanguageModel
from sambay.model.folder import stored_name
from tests.tiny import VOCAB, tiny_model

OFFICIAL = "phi4flash"
VARIANTS = (
    "transformer++",
    "samba",
    "sambay",
    "sambay+da",
    "mambay",
    "sambay-aa",
    "sambay-mlp",
    OFFICIAL,
)
PAD, EOS = 0, 1
# What the official class can express of the tiny shape; 8 heads of 6 make up the hidden size.
_OFFICIAL_FIELDS: dict[str, Any] = {
    "hidden_size": 48,
    "norm": "layer",
    "attention_bias": True,
    "parametrization": "standard",
    "attention_scale": 6**-0.5,
}


def tiny_native(name: str, dtype: torch.dtype = torch.float32, **fields: Any) -> LanguageModel:
    """The tiny model of a family member, or of the official layout."""
    if name == OFFICIAL:
        return tiny_model("sambay+da", dtype=dtype, **(_OFFICIAL_FIELDS | fields))
    return tiny_model(name, dtype=dtype, **fields)


def twin(model: LanguageModel, *, official_layout: bool = False) -> SambaYForCausalLM:
    """transformers' class with the same weights, in evaluation mode."""
    ids = {"pad_token_id": PAD, "eos_token_id": EOS}
    if official_layout:
        config = Phi4FlashConfig(**official.describe(model.config) | ids)
        other: SambaYForCausalLM = Phi4FlashForCausalLM(config)
    else:
        other = SambaYForCausalLM(SambaYConfig.from_model_config(model.config, **ids))
    other = other.to(model.head_weight.dtype)
    other.load_state_dict({stored_name(name): x for name, x in model.state_dict().items()})
    return other.eval()


def fresh_pair(name: str, **fields: Any) -> tuple[LanguageModel, SambaYForCausalLM]:
    """A tiny model and its twin, for tests that change them."""
    model = tiny_native(name, **fields)
    return model, twin(model, official_layout=name == OFFICIAL)


@functools.cache
def pair(name: str) -> tuple[LanguageModel, SambaYForCausalLM]:
    """A tiny model and its twin, shared between tests that only read them."""
    return fresh_pair(name)


def padded(rows: list[Tensor], side: str, columns: int | None = None) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, (B, T) each, of rows of different lengths."""
    columns = columns or max(len(row) for row in rows)
    ids = torch.full((len(rows), columns), PAD)
    mask = torch.zeros(len(rows), columns, dtype=torch.int64)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(columns - len(row), columns)
        ids[index, place], mask[index, place] = row, 1
    return ids, mask


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One word per id: w2, w3, ..., each with the space before it."""
    words = {f"\u0120w{index}": index for index in range(2, VOCAB)}  # a byte-level space
    inner = tokenizers.Tokenizer(
        models.WordLevel({"<pad>": PAD, "<eos>": EOS} | words, unk_token="<pad>")
    )
    inner.normalizer = normalizers.Prepend(" ")
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(r" ?\S+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def save_with_tokenizer(model: SambaYForCausalLM, folder: Path) -> Path:
    """A model folder that pipelines accept."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
