"""Long generation in slots with a look at the memory: 100,000 tokens, or any other number.

    python -m benchmarks.soak --tokens 100000 --out build/benchmarks/soak.json

One request goes on for most of the tokens while others come and go in the slots beside it. Buffers
are planned before the start, so that the memory of the process must stay as it is; what it grew by
is printed, and more than `--most-growth` megabytes is an error.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import torch

from benchmarks.measure import environment, write_result
from sambay.generate import Request, SlotEngine
from sambay.model import LanguageModel
from sambay.spec.named import named

LOOKS = 50  # readings of the memory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/soak.json"))
    parser.add_argument("--model", default="sambay-20m", help="a name of sambay.spec.named")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--most-growth", type=float, default=16.0, metavar="MB")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = soak(args.model, args.tokens, args.slots, args.device)
    write_result(args.out, {"environment": environment(), "result": result})
    grown = result["grown_bytes"] / 1e6
    print(
        f"{result['tokens']:,} tokens, {result['requests']:,} requests, "
        f"{result['tokens_per_second']:.0f} tokens/s; memory grew by {grown:.1f} MB"
    )
    return int(grown > args.most_growth)


def soak(name: str, tokens: int, num_slots: int, device: str) -> dict:
    """Readings of the memory over a run of so many tokens."""
    model = LanguageModel(named(name)).eval().to(device)
    vocab_size, chance = model.config.vocab_size, random.Random(0)
    longest = max(2, tokens * 2 // 3 if num_slots > 1 else tokens)
    engine = SlotEngine(model, slots=num_slots, capacity=longest + 500)

    def passing() -> Request:
        prompt = chance.choices(range(vocab_size), k=chance.randint(1, 500))
        return Request(prompt, chance.randint(1, max(1, min(1000, tokens // 10))))

    engine.submit(Request([1], longest))
    readings: list[int] = []
    produced = requests = 0
    began = time.perf_counter()
    while produced < tokens:
        while engine.num_waiting + engine.num_running < num_slots:
            engine.submit(passing())
            requests += 1
        produced += len(engine.step())
        if produced * LOOKS >= tokens * (len(readings) + 1):
            readings.append(memory_bytes(device))
    # The first tenth builds what is built once: kernels, tables, the allocator's own reserves.
    settled = readings[len(readings) // 10]
    return {
        "model": name,
        "tokens": produced,
        "requests": requests + 1,
        "tokens_per_second": produced / (time.perf_counter() - began),
        "cache_bytes": engine.cache_bytes,
        "memory_bytes": readings,
        "grown_bytes": max(readings) - settled,
        "step_mode": engine.step_mode,
    }


def memory_bytes(device: str) -> int:
    """What the process holds: of the device's memory, or of the machine's (Linux)."""
    if device != "cpu":
        return torch.cuda.memory_reserved()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


if __name__ == "__main__":
    sys.exit(main())
