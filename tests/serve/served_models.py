"""Small models in folders as they are served, prompts, and what must come out."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sambay.generate.reference import reference_generate
from sambay.hf import official
from sambay.model import LanguageModel
from sambay.model.folder import save_model_folder
from tests.tiny import VOCAB, tiny_model

# Found without importing it: the environment of the other tests has none, and importing is slow.
HAS_VLLM = importlib.util.find_spec("vllm") is not None
NEEDS_VLLM = pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not here: make serve-test")
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
OFFICIAL: dict[str, Any] = {
    "norm": "layer", "attention_bias": True, "attention_scale": 0.25, "num_heads": 4,
    "num_kv_heads": 2, "embedding_multiplier": 1.0, "residual_multiplier": 1.0,
    "logit_multiplier": 1.0,
}  # fmt: skip
LENGTHS = (1, 2, 3, 4, 5, 7, 16, 17, 31, 33, 48, 63, 64, 65, 90, 100)


@dataclasses.dataclass(frozen=True)
class Served:
    """A model, its folder, 32 prompts of mixed lengths, and their greedy continuations."""

    model: LanguageModel
    folder: Path
    prompts: list[list[int]]
    tokens: list[list[int]]
    logits: list[Tensor]


def served(name: str, folder: Path, *, layout: str = "native", new: int = 8, **fields: Any):
    """A tiny model of the family, written, and what it says."""
    shape = SIZES | (OFFICIAL if layout == "official" else {}) | fields
    model = tiny_model(name, dtype=torch.float32, **shape)
    if layout == "official":
        official.save(folder, model)
    else:
        save_model_folder(folder, model)
    prompts = mixed_prompts()
    answers = [reference_generate(model, prompt, new) for prompt in prompts]
    return Served(model, folder, prompts, [a for a, _ in answers], [b for _, b in answers])


def mixed_prompts(seed: int = 3, longest: int = 300) -> list[list[int]]:
    """32 prompts from 1 to `longest` tokens; four of them share their first 140."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(0, VOCAB, (count,), generator=generator).tolist()

    shared = draw(140)
    lengths = [*LENGTHS, *(length + 128 for length in LENGTHS[:11]), longest]
    return [*map(draw, lengths), *(shared + draw(count) for count in (3, 20, 61, 117))]


def environment() -> None:
    """What vLLM reads from the environment when it is imported."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # starts in half the time
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


class Engine:
    """vLLM's engine on a folder, with eager float32 and no tokenizer unless told otherwise."""

    def __init__(self, folder: Path, **options: Any) -> None:
        environment()
        # vLLM fills buffers that it does not read and leaves others as they are.
        torch.use_deterministic_algorithms(False)
        from vllm import LLM

        plain: dict[str, Any] = {
            "dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True,
            "max_model_len": 512, "enable_prefix_caching": False, "max_num_seqs": 40,
            "seed": 0,
        }  # fmt: skip
        self.llm = LLM(str(folder), **(plain | options))

    def generate(
        self, prompts: Sequence[Sequence[int]], new: int, lora_request: Any = None, **sampling: Any
    ) -> list[Any]:
        """The outputs of vLLM for all prompts in one call."""
        from vllm import SamplingParams

        sampling = {"temperature": 0.0, "ignore_eos": True, "detokenize": False} | sampling
        params = SamplingParams(max_tokens=new, **sampling)
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return self.llm.generate(inputs, params, use_tqdm=False, lora_request=lora_request)

    def tokens(
        self, prompts: Sequence[Sequence[int]], new: int, lora_request: Any = None
    ) -> list[list[int]]:
        """The greedy continuations."""
        outputs = self.generate(prompts, new, lora_request)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        """Give the memory back and leave vLLM's groups of processes."""
        import gc

        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()


def largest_error(outputs: Sequence[Any], expected: Served) -> float:
    """The largest distance of log-probabilities from the model's own, over all returned tokens."""
    worst = 0.0
    for output, logits in zip(outputs, expected.logits, strict=True):
        own = torch.log_softmax(logits, dim=-1)
        for step, entries in enumerate(output.outputs[0].logprobs):
            for token, entry in entries.items():
                worst = max(worst, abs(entry.logprob - float(own[step, token])))
    assert math.isfinite(worst)
    return worst
