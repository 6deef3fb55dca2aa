"""Our models inside transformers: against our own engine, and against its Llama and Jamba.

    python -m benchmarks.huggingface --out build/benchmarks/huggingface.json

Three questions: what does `generate` cost over our engine with the same weights; how long does the
prefill of a prompt take beside transformers' own models of equal size; and how long a step behind
a long context. For the last, caches are filled with noise, since a step's cost does not depend on
the values.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.measure import environment, interleaved, print_table, write_result
from sambay.generate import Engine, Request
from sambay.hf.configuration import SambaYConfig
from sambay.hf.modeling import SambaYForCausalLM
from sambay.model import LanguageModel
from sambay.spec import ModelConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/huggingface.json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 2048])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prefill", type=int, default=2048)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    result = {
        "environment": environment(),
        "generate": [
            generate(args.batch, prompt, args.new_tokens, args.rounds) for prompt in args.prompts
        ],
        "prefill": prefill(args.prefill, args.rounds),
        "decode": decode(args.batch, args.context, args.rounds),
    }
    write_result(args.out, result)


def wrapped(config: ModelConfig) -> SambaYForCausalLM:
    """One of our models as a class of transformers."""
    return SambaYForCausalLM(SambaYConfig.from_model_config(config)).eval()


@torch.inference_mode()
def generate(batch: int, prompt: int, new_tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of `generate` and of our engine for the same greedy tokens with the same weights."""
    config = peers.sambay_20m()
    model = LanguageModel(config).eval()
    theirs: Any = wrapped(config)
    names = {"head.weight": "lm_head.weight"}
    theirs.load_state_dict({names.get(k, f"model.{k}"): v for k, v in model.state_dict().items()})
    ids = torch.randint(0, config.vocab_size, (batch, prompt))
    engine = Engine(model)
    written: dict[str, Tensor] = {}

    def by_engine() -> None:
        requests = [Request(row.tolist(), new_tokens) for row in ids]
        rows = engine.generate_many(requests, max_batch_size=batch)
        written["engine"] = torch.tensor([row.tokens for row in rows])

    def by_transformers() -> None:
        out = theirs.generate(ids, max_new_tokens=new_tokens, do_sample=False)
        written["transformers"] = out[:, prompt:]

    seconds = interleaved(
        {"engine": by_engine, "transformers": by_transformers}, rounds=rounds, warmup=1
    )
    pairs = zip(seconds["transformers"], seconds["engine"], strict=True)
    result = {
        "batch": batch,
        "prompt": prompt,
        "new_tokens": new_tokens,
        "equal_tokens": float((written["engine"] == written["transformers"]).float().mean()),
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "transformers_over_engine": statistics.median(a / b for a, b in pairs),
    }
    print(
        f"\ngenerate, batch {batch}, {prompt} + {new_tokens} tokens: transformers takes "
        f"{result['transformers_over_engine']:.2f} of the engine's time "
        f"({result['equal_tokens']:.0%} of the tokens are equal)"
    )
    return result


def models() -> dict[str, nn.Module]:
    """Ours and transformers' own, of equal size."""
    return {
        "SambaY": wrapped(peers.sambay_20m()),
        "Transformer++": wrapped(peers.transformer_20m()),
        "Llama": peers.llama()[0].eval(),
        "Jamba": peers.jamba()[0].eval(),
    }


@torch.inference_mode()
def prefill(length: int, rounds: int) -> dict[str, Any]:
    """Seconds from a prompt to the logits of its last token and a cache."""
    ids = torch.randint(0, peers.VOCAB, (1, length))

    def run(model: Any) -> Callable[[], object]:
        return lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1)

    return _compared(f"prefill of {length} tokens", run, rounds)


@torch.inference_mode()
def decode(batch: int, context: int, rounds: int) -> dict[str, Any]:
    """Seconds of a step behind a context of noise."""
    ids = torch.randint(0, peers.VOCAB, (batch, 1))

    def run(model: Any) -> Callable[[], object]:
        cache = filled(model, ids, context)
        return lambda: model(input_ids=ids, past_key_values=cache, use_cache=True)

    return _compared(f"decode step, batch {batch}, context {context}", run, rounds)


def filled(model: Any, ids: Tensor, context: int) -> Any:
    """A cache of `context` columns: one real step makes the layers, noise fills them."""
    cache = model(input_ids=ids, use_cache=True).past_key_values
    for layer in cache.layers:
        keys = getattr(layer, "keys", None)
        if keys is not None and keys.numel():
            noise = torch.randn(*keys.shape[:2], context - 1, keys.shape[3])
            layer.update(noise, noise.clone())
    return cache


def _compared(
    title: str, run: Callable[[Any], Callable[[], object]], rounds: int
) -> dict[str, Any]:
    steps = {name: run(model) for name, model in models().items()}
    seconds = interleaved(steps, rounds=rounds, warmup=1)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {
        name: statistics.median(
            theirs / mine for theirs, mine in zip(times, seconds["SambaY"], strict=True)
        )
        for name, times in seconds.items()
    }
    print(f"\n{title}, float32")
    print_table(
        ["model", "ms", "of SambaY's time"],
        [[name, f"{medians[name] * 1e3:.1f}", f"{ratios[name]:.2f}x"] for name in medians],
    )
    return {"title": title, "seconds": medians, "times_sambay": ratios}


if __name__ == "__main__":
    main()
