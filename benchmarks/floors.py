"""Decode steps on the CPU against the time it takes to read what they must read.

    python -m benchmarks.floors --out build/benchmarks/floors.json

Every step reads the weights once, the recurrent states, and every cached key and value once per
layer that reads it; divided by the bandwidth at which the same threads sum a large buffer, that is
the floor. The buffer is summed in every round beside the steps, so that both see the same machine.
The cost of a step does not depend on the values in the cache, which is filled with noise. With
`--profile` the time of each step is divided among the operations that ran.
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
from sambay.model import LanguageModel, ModelCache
from sambay.spec import LayerKind, ModelConfig, footprint, presets

BANDWIDTH = "read"  # the round's name of the sum over a large buffer
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
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
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=tuple(DTYPES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 16_384])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--llama", action="store_true", help="also transformers' Llama of 20m")
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
    for name in args.models:
        config = make_config(name, size)
        model = LanguageModel(config).to(DTYPES[dtype]).eval()
        steps[name] = step_of(model, batch, context, DTYPES[dtype])
        needed[name] = step_bytes(model, batch, context, DTYPES[dtype].itemsize)
    if args.llama and size == "20m":
        steps["llama"], needed["llama"] = llama_step(batch, context, DTYPES[dtype])
    buffer = torch.ones(32 * 2**20)
    rounds = {BANDWIDTH: buffer.sum, **steps}
    seconds = interleaved(rounds, rounds=args.rounds, warmup=2)
    result: dict[str, Any] = {"size": size, "dtype": dtype, "batch": batch, "context": context}
    result["read_bytes_per_second"] = buffer.nbytes / statistics.median(seconds[BANDWIDTH])
    result["models"] = {
        name: entry_of(seconds[name], seconds[BANDWIDTH], needed[name] / buffer.nbytes)
        | {"bytes": needed[name]}
        for name in steps
    }
    if args.profile:
        for name, step in steps.items():
            result["models"][name]["operations"] = profile(step)
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


def step_of(
    model: LanguageModel, batch: int, context: int, dtype: torch.dtype
) -> Callable[[], Tensor]:
    """A step that always decodes column `context`."""
    cache = ModelCache.allocate(model.config, batch, context + 1, dtype, "cpu")
    for state in cache.layers:
        for buffer in state.buffers.values() if state is not None else ():
            buffer.normal_()
    ids = torch.randint(0, model.config.vocab_size, (batch, 1))

    def step() -> Tensor:
        cache.length = context
        return model(ids, cache=cache, outputs="last")

    return step


def step_bytes(model: LanguageModel, batch: int, context: int, itemsize: int) -> int:
    """What a step must read: weights (a tied embedding once, as the head), states, columns."""
    config = model.config
    weights = sum(parameter.nbytes for parameter in model.parameters())
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


def profile(step: Callable[[], object], repeats: int = 10) -> dict[str, Any]:
    """Of the ten operations with the most time of their own: microseconds and calls per step.

    Kernels called by their address appear only as the time that no operation explains.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        for _ in range(repeats):
            step()
    events = sorted(record.key_averages(), key=lambda e: -e.self_cpu_time_total)[:10]
    return {
        event.key: {
            "microseconds": round(event.self_cpu_time_total / repeats, 1),
            "calls": event.count / repeats,
        }
        for event in events
    }


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
        for key, one in entry.get("operations", {}).items():
            print(f"  {name}: {key} {one['microseconds']} us in {one['calls']:g} calls")


if __name__ == "__main__":
    main()
