"""Decode steps on the CPU against the time it takes to read what they must read.

    python -m benchmarks.floors --out build/benchmarks/floors.json

Every step reads the weights once, the recurrent states, and every cached key and value once per
layer that reads it; divided by the bandwidth at which the same threads sum a large buffer, that is
the floor. The buffer is summed in every round beside the steps, so that both see the same machine.
The cost of a step does not depend on the values in the cache, which is filled with noise. Steps are
those of `SlotEngine`, captured unless `--plain` is given. With `--profile` the time of a step is
divided among its kernels.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.measure import environment, interleaved, print_table, write_result
from sambay.generate.decode_step import DecodeStep
from sambay.hf.quantisation import quantise
from sambay.layers.quantised import held_tensors
from sambay.model import LanguageModel
from sambay.model.slots import SlotCache
from sambay.spec import LayerKind, ModelConfig, footprint, presets

BANDWIDTH = "read"  # the round's name of the sum over a large buffer
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Weights of so many bits, by torchao, in models that compute in bfloat16.
INTEGERS = {"int8": 8, "int4": 4}
# Hidden size, depth, vocabulary and heads of about 20 and 120 million parameters.
SIZES: dict[str, dict[str, Any]] = {
    "20m": {"hidden_size": 384, "depth": 8, "vocab_size": 4096, "num_heads": 8, "head_dim": 48},
    "120m": {"hidden_size": 768, "depth": 12, "vocab_size": 8192, "num_heads": 12, "head_dim": 64},
}
MODELS = ("sambay", "sambay+da", "transformer++")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/floors.json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=tuple(SIZES))
    parser.add_argument("--dtypes", nargs="+", choices=(*DTYPES, *INTEGERS), default=tuple(DTYPES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 16_384])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--llama", action="store_true", help="also transformers' Llama of 20m")
    parser.add_argument("--plain", action="store_true", help="steps that are not captured")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    cases = itertools.product(args.sizes, args.dtypes, args.batches, args.contexts)
    for size, dtype, batch, context in cases:
        results.append(measure(args, size, dtype, batch, context))
        show(results[-1])
    write_result(args.out, {"environment": environment(), "results": results})


@torch.inference_mode()
def measure(args: argparse.Namespace, size: str, dtype: str, batch: int, context: int) -> dict:
    """Seconds of a step of every model, its floor in the same rounds, and their quotient."""
    steps, needed = {}, {}
    computed = DTYPES.get(dtype, torch.bfloat16)
    for name in args.models:
        config = make_config(name, size)
        model = LanguageModel(config).to(computed).eval()
        if dtype in INTEGERS:
            quantise(model, dtype)
        steps[name] = Step(model, batch, context, computed, capture=not args.plain)
        needed[name] = step_bytes(model, batch, context, computed.itemsize, INTEGERS.get(dtype, 0))
    if args.llama and size == "20m" and dtype in DTYPES:
        steps["llama"], needed["llama"] = llama_step(batch, context, DTYPES[dtype])
    buffer = torch.ones(32 * 2**20)
    rounds = {BANDWIDTH: buffer.sum, **steps}
    seconds = interleaved(rounds, rounds=args.rounds, warmup=1, settling=2)
    result: dict[str, Any] = {"size": size, "dtype": dtype, "batch": batch, "context": context}
    result["read_bytes_per_second"] = buffer.nbytes / statistics.median(seconds[BANDWIDTH])
    result["models"] = {
        name: entry_of(seconds[name], seconds[BANDWIDTH], needed[name] / buffer.nbytes)
        | {"bytes": needed[name]}
        for name in steps
    }
    if args.profile:
        for name in args.models:
            result["models"][name]["kernels"] = steps[name].profile()
    return result


def entry_of(seconds: list[float], reading: list[float], buffers: float) -> dict[str, Any]:
    """Medians of a step and of its floor, and of their quotient within a round."""
    quotients = [mine / (buffers * read) for mine, read in zip(seconds, reading, strict=True)]
    return {
        "step_seconds": statistics.median(seconds),
        "fastest_seconds": min(seconds),
        "floor_seconds": buffers * statistics.median(reading),
        "times_the_floor": statistics.median(quotients),
        "fastest_times_the_floor": min(seconds) / (buffers * min(reading)),
    }


def make_config(name: str, size: str) -> ModelConfig:
    """A preset at one of the sizes; Transformer++ is widened until it is as large as the others."""
    shape = dict(SIZES[size])
    depth, key_heads = shape.pop("depth"), 4 if size == "120m" else 2
    if name == "transformer++":
        shape["hidden_size"] = {"20m": 400, "120m": 800}[size]
    else:
        shape["window"] = 128
    return presets.build(name, depth, num_kv_heads=key_heads, **shape)


class Step:
    """A decode step of the engine's own kind, captured if it can be, always of column `context`."""

    def __init__(
        self, model: LanguageModel, batch: int, context: int, dtype: torch.dtype, capture: bool
    ) -> None:
        self._cache = SlotCache(model, batch, context + 1, dtype)
        for slot in range(batch):
            for state in self._cache.row(slot, 0).layers:
                for buffer in state.buffers.values() if state is not None else ():
                    buffer.normal_()
        with self._cache.all_idle():
            self._step = DecodeStep(model, self._cache, capture=capture)
        self._step.tokens_B.random_(model.config.vocab_size)
        self._context = context

    def __call__(self) -> Tensor:
        self._cache.lengths_B.fill_(self._context)
        return self._step.run(self._cache.num_slots)

    def profile(self, repeats: int = 20) -> dict[str, float] | None:
        """Milliseconds of each kernel in a step, the longest first; None if steps are plain."""
        rounds = []
        for _ in range(repeats):
            self._cache.lengths_B.fill_(self._context)
            rounds.append(self._step.seconds_by_kernel(self._cache.num_slots))
        if rounds[0] is None:
            return None
        median = {name: 1e3 * statistics.median(r[name] for r in rounds) for name in rounds[0]}
        return dict(sorted(median.items(), key=lambda item: -item[1]))


def step_bytes(model: LanguageModel, batch: int, context: int, itemsize: int, bits: int = 0) -> int:
    """What a step must read: weights (a tied embedding once, as the head), states, columns.

    Quantised weights are integers of so many `bits`, and their scales.
    """
    config = model.config
    weights = 0
    for parameter in model.parameters():
        held = held_tensors(parameter)
        weights += held[0].numel() * bits // 8 + held[1].nbytes if held else parameter.nbytes
    if not config.tie_embeddings:
        weights -= model.embedding.weight.nbytes
    readers = {
        LayerKind.FULL: context,
        LayerKind.CROSS: context,
        LayerKind.SLIDING: min(config.window or context, context),
    }
    columns = sum(readers.get(layer.kind, 0) for layer in config.layers)
    states = footprint.cache_bytes(config, batch, 0, kv_bytes=itemsize)
    return weights + states + 2 * batch * columns * config.num_kv_heads * config.head_dim * itemsize


def llama_step(batch: int, context: int, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """A step of transformers' Llama over a cache filled with noise, and its bytes."""
    from transformers import DynamicCache

    model, _ = peers.llama()
    model = model.to(dtype).eval()
    shape = (batch, 2, context, 48)
    ids = torch.randint(0, peers.VOCAB, (batch, 1))
    cache: Any = DynamicCache()
    for layer in range(8):
        cache.update(torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), layer)

    def step() -> object:
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache.crop(-1)
        return out

    weights = sum(parameter.nbytes for parameter in model.parameters())
    return step, weights + 8 * 2 * batch * 2 * context * 48 * dtype.itemsize


def show(result: dict) -> None:
    """A table of one case."""
    print(
        f"\n{result['size']} {result['dtype']}, batch {result['batch']}, context "
        f"{result['context']}, reading {result['read_bytes_per_second'] / 1e9:.1f} GB/s"
    )
    rows = [
        [
            name,
            f"{entry['bytes'] / 1e6:.0f}",
            f"{1e3 * entry['step_seconds']:.2f}",
            f"{1e3 * entry['floor_seconds']:.2f}",
            f"{entry['times_the_floor']:.2f}",
            f"{entry['fastest_times_the_floor']:.2f}",
        ]
        for name, entry in result["models"].items()
    ]
    print_table(["model", "MB", "step ms", "floor ms", "x floor", "fastest x"], rows)
    for name, entry in result["models"].items():
        for kernel, milliseconds in (entry.get("kernels") or {}).items():
            print(f"  {name}: {kernel} {milliseconds:.3f} ms")


if __name__ == "__main__":
    main()
