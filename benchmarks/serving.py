"""vLLM with SambaY and with Transformer++ of equal size, and this package's engine beside it.

    .venv-vllm/bin/python -m benchmarks.serving --out build/benchmarks/serving.json

Both servers run at once and are asked in turn, so that one of them is always idle; random weights,
greedy answers of one length. "engine" is our `SlotEngine` with as many slots: what the
server, its scheduler and HTTP cost beside plain generation of the same tokens. With --compile the
servers start as those of `sambay serve` do; docs/results/serving.json holds a result of each kind.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.measure import environment, write_result
from sambay.generate import Engine, Request
from sambay.hf.loading import load_model
from sambay.hf.random_checkpoint import Layout, write_random_checkpoint
from sambay.serve.command import ServerOptions, running_server
from sambay.serve.load import Server, Workload
from sambay.serve.load_report import as_json, compare, lines, measure

CONFIGS = {"SambaY": peers.sambay_20m, "Transformer++": peers.transformer_20m}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/serving.json"))
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=2048)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--requests", type=int)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--log", type=Path, help="where the servers write what they say")
    args = parser.parse_args()
    workload = Workload(prompt_tokens=args.prompt_tokens, new_tokens=args.new_tokens)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folders = {name: Path(scratch) / name for name in CONFIGS}
        for name, folder in folders.items():
            write_random_checkpoint(folder, CONFIGS[name](), Layout.NATIVE, dtype=torch.float32)
        output = os.open(args.log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        servers = []
        for name, folder in folders.items():
            options = ServerOptions(
                port=free_port(), name=name, dtype="float32", compiled=args.compile, cache_gib=2,
                max_length=args.prompt_tokens + args.new_tokens, prefix_caching=False,
            )  # fmt: skip
            stack.enter_context(running_server(folder, options, output=output))
            servers.append(Server(name, options.url, name))
            print(f"{name} answers", flush=True)
        levels = measure(
            servers, workload, args.concurrency, requests=args.requests, rounds=args.rounds,
            tell=lambda line: print(line, flush=True),
        )  # fmt: skip
        stack.close()  # our engine gets the machine to itself
        engine = {
            name: {n: engine_speed(folder, workload, n) for n in args.concurrency}
            for name, folder in folders.items()
        }
    comparisons = compare(levels)
    print("\n".join(lines(levels, comparisons)))
    overhead = {
        name: statistics.median(
            engine[name][level.concurrency] / level.new_tokens_per_second for level in found
        )
        for name, found in levels.items()
    }
    for name, ratio in overhead.items():
        print(f"{name}: our engine generates {ratio:.2f} times as fast, median of the levels")
    result: dict[str, Any] = {
        "environment": environment(),
        "options": {"compiled": args.compile, "rounds": args.rounds},
        **as_json(workload, levels, comparisons),
        "engine_new_tokens_per_second": engine,
        "engine_against_server": overhead,
    }
    write_result(args.out, result)


def engine_speed(folder: Path, workload: Workload, count: int) -> float:
    """New tokens per second of `count` requests in one batch, prompts included."""
    engine = Engine(load_model(folder))
    asked = [
        Request(workload.prompt(number), max_new_tokens=workload.new_tokens)
        for number in range(count)
    ]
    engine.generate_many(
        [dataclasses.replace(request, max_new_tokens=2) for request in asked[:1]], max_batch_size=1
    )
    start = time.perf_counter()
    completions = engine.generate_many(asked, max_batch_size=count)
    seconds = time.perf_counter() - start
    assert all(len(completion.tokens) == workload.new_tokens for completion in completions)
    return count * workload.new_tokens / seconds


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    main()
