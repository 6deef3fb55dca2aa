"""Tiny model folders with a byte tokenizer and Phi's chat template, and backends on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from sambay.evals.backends.engine import EngineBackend
from sambay.evals.backends.identity import weights_sha256
from sambay.evals.backends.prompts import Prompts, open_prompts
from sambay.evals.backends.transformers import TransformersBackend, load_transformers
from sambay.generate import Engine, TextGenerator
from sambay.hf.loading import load_model
from sambay.hf.tokenizer import load_tokenizer
from tests.hf.tiny_chat import chat_folder, chat_tokenizer

__all__ = ["chat_folder", "engine_on", "llama_folder", "text_side", "transformers_on"]


def text_side(folder: Path, template: str | None = None) -> Prompts:
    tokenizer = load_tokenizer(folder / "tokenizer.json", folder)
    return open_prompts(tokenizer, folder, folder, template)


def engine_on(folder: Path, **settings: Any) -> EngineBackend:
    prompts = text_side(folder)
    generator = TextGenerator(Engine(load_model(folder)), prompts.tokenizer)
    facts = {"name": folder.name, "weights_sha256": weights_sha256(folder)}
    return EngineBackend(generator, prompts, facts, **settings)


def transformers_on(folder: Path, **settings: Any) -> TransformersBackend:
    model, prompts = load_transformers(folder)
    return TransformersBackend(model, prompts, {"name": folder.name}, **settings)


def llama_folder(folder: Path) -> Path:
    """A model that this package has no class for."""
    config = LlamaConfig(
        vocab_size=len(chat_tokenizer()), hidden_size=24, intermediate_size=36,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, bos_token_id=0, eos_token_id=[0, 1], initializer_range=0.5,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder
