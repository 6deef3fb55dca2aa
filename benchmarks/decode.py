"""Decoding behind a long context: SambaY against Transformer++ of equal size, and their caches.

    python -m benchmarks.decode --out build/benchmarks/decode.json

The cost of a step does not depend on the values in the cache, so the context is filled with noise
instead of being prefilled. Beside each time stand the bytes a step must read at least: the weights
once and every cached key and value once per layer that reads it, at the copy bandwidth of this
machine.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.measure import environment, interleaved, write_result
from sambay.model import LanguageModel, ModelCache
from sambay.spec import LayerKind, ModelConfig, footprint

CONFIGS = {"SambaY": peers.sambay_20m, "Transformer++": peers.transformer_20m}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/decode.json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16_384])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bandwidth = read_bandwidth()
    results = [compare(args.batch, context, args.rounds, bandwidth) for context in args.contexts]
    write_result(
        args.out,
        {"environment": environment(), "read_bytes_per_second": bandwidth, "results": results},
    )


@torch.inference_mode()
def compare(batch: int, context: int, rounds: int, bandwidth: float) -> dict:
    """Tokens per second of a step behind `context` tokens, cache bytes, and the floor of bytes."""
    steps, result = {}, {"batch": batch, "context": context, "models": {}}
    for name, make in CONFIGS.items():
        config = make()
        model = LanguageModel(config).eval()
        cache = filled_cache(config, batch, context)
        full = ModelCache.allocate(config, batch, context, torch.float32, "cpu").nbytes
        formula = footprint.cache_bytes(config, batch, context, kv_bytes=4)
        assert full == formula, (full, formula)
        bytes_read = step_bytes(config, batch, context)
        result["models"][name] = {
            "parameters": peers.parameters(model),
            "cache_bytes": full,
            "cache_bytes_by_formula": formula,
            "bytes_read_per_step": bytes_read,
            "floor_seconds": bytes_read / bandwidth,
        }
        steps[name] = decode_step(model, cache, batch, context)
    seconds = interleaved(steps, rounds=rounds, warmup=2)
    for name, times in seconds.items():
        entry = result["models"][name]
        entry["step_seconds"] = statistics.median(times)
        entry["tokens_per_second"] = batch / entry["step_seconds"]
        entry["times_the_floor"] = entry["step_seconds"] / entry["floor_seconds"]
    result["speed_of_sambay"] = statistics.median(
        theirs / mine
        for theirs, mine in zip(seconds["Transformer++"], seconds["SambaY"], strict=True)
    )
    print(f"\ndecode, batch {batch}, context {context}, float32")
    for name, entry in result["models"].items():
        print(
            f"  {name:14s} {entry['tokens_per_second']:8.0f} tokens/s   "
            f"{entry['times_the_floor']:5.2f} x the time to read {entry['bytes_read_per_step']:,} "
            f"bytes   cache {entry['cache_bytes']:,} bytes"
        )
    print(f"  SambaY is {result['speed_of_sambay']:.2f} x as fast")
    return result


def filled_cache(config: ModelConfig, batch: int, context: int) -> ModelCache:
    """A cache that stands behind `context` columns of noise, with room for one more."""
    cache = ModelCache.allocate(config, batch, context + 1, torch.float32, "cpu")
    for state in cache.layers:
        for buffer in state.buffers.values() if state is not None else ():
            buffer.normal_()
    cache.length = context
    return cache


def decode_step(model: LanguageModel, cache: ModelCache, batch: int, context: int):
    """A step that always decodes column `context`."""
    ids = torch.randint(0, model.config.vocab_size, (batch, 1))

    def step() -> None:
        cache.length = context
        model(ids, cache=cache, outputs="last")

    return step


def step_bytes(config: ModelConfig, batch: int, context: int) -> int:
    """Bytes a float32 step must read: weights, state, and keys and values per reading layer."""
    per_column = 2 * config.num_kv_heads * config.head_dim * 4
    readers = {
        LayerKind.FULL: context,
        LayerKind.CROSS: context,
        LayerKind.SLIDING: min(config.window or context, context),
    }
    columns = sum(readers.get(layer.kind, 0) for layer in config.layers)
    state = footprint.cache_bytes(config, batch, 0, kv_bytes=4)
    return 4 * footprint.parameter_count(config) + batch * columns * per_column + state


def read_bandwidth() -> float:
    """Bytes per second at which this process sums 512 MB of float32, the best of five."""
    values = torch.ones(128 * 2**20)
    seconds = interleaved({"sum": lambda: values.sum()}, rounds=5, warmup=1)["sum"]
    return values.nbytes / min(seconds)


if __name__ == "__main__":
    main()
