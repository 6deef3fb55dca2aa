"""Where the time of a training step and of a prefill goes on the CPU, beside their floors.

    python -m benchmarks.profiles --out build/benchmarks/profiles.json --picture build/profile.png

Every operation of torch and every kernel of ours is timed by torch's profiler and counted to one of
a few kinds. Floors: the matrix products at the rate of a large product of the same run, where all
their operations are counted from the shapes; a decode step's floors are `benchmarks.floors`'.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import peers
from benchmarks.measure import environment, print_table, write_result
from sambay.model import LanguageModel
from sambay.ops.native import library

MODELS = {"SambaY": peers.sambay_20m, "Transformer++": peers.transformer_20m}
# The first kind that has a part of an operation's name gets its time.
KINDS = {
    "matrix products": "mm skinny_linear mkldnn linear matmul",
    "scan": "scan Scan",
    "attention": "attention flash softmax",
    "convolution": "conv",
    "norm, gates, loss": "norm silu gate nll mul add exp sum sub div pow",
    "copies": "copy cat fill zero empty contiguous index embedding clone",
    "optimizer": "Optimizer adam lerp sqrt",
}
OTHER = "other"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/profiles.json"))
    parser.add_argument("--picture", type=Path, help="also draw it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", type=int, default=8192, help="tokens of the prompt")
    parser.add_argument("--batch", type=int, default=4, help="rows of a training step")
    parser.add_argument("--columns", type=int, default=512, help="tokens of each row")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    name_kernels()
    results = {}
    for model_name, config in MODELS.items():
        torch.manual_seed(0)
        model = LanguageModel(config())
        ids = torch.randint(0, peers.VOCAB, (1, args.prefill))
        results[f"prefill of {args.prefill} tokens, {model_name}"] = divide(
            prefill_of(model.eval(), ids), args.repeats
        )
        model, forward = peers.ours(config())
        ids = torch.randint(0, peers.VOCAB, (args.batch, args.columns + 1))
        title = f"training step of {args.batch} x {args.columns} tokens, {model_name}"
        results[title] = divide(peers.training_step(model, forward, ids), args.repeats)
    # The machine is not always as fast: the floor is that of its best moment.
    rate = max(result.pop("flops_per_second") for result in results.values())
    for title, result in results.items():
        result["product_floor_seconds"] = result["product_flops"] / rate
        show(title, result, rate)
    found = {"environment": environment(), "flops_per_second": rate, "results": results}
    write_result(args.out, found)
    if args.picture:
        draw(results, args.picture)


def name_kernels() -> None:
    """Let torch's profiler see the kernels of ours, which it would count to what calls them."""
    if (reason := library.why_unavailable()) is not None:
        print(f"no kernels of ours: {reason}")
        return
    kernels = library.kernels()
    for name in library.kernel_names():
        setattr(kernels, name, _named(name, getattr(kernels, name)))


def _named(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        with torch.profiler.record_function(name):
            return kernel(*arguments)

    return call


def prefill_of(model: LanguageModel, ids: torch.Tensor) -> Callable[[], object]:
    """The logits behind a prompt, as prefill computes them."""

    @torch.inference_mode()
    def prefill() -> object:
        return model(ids, outputs="last")

    return prefill


def divide(work: Callable[[], object], repeats: int) -> dict[str, Any]:
    """Seconds of a call by kind of operation, of the whole, and at least for its products."""
    work()
    counter = FlopCounterMode(display=False)
    with counter:
        work()
    flops = counter.get_total_flops()
    seconds, rates = [], []
    for _ in range(repeats):
        rates.append(product_rate())
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        for _ in range(repeats):
            work()
    kinds = dict.fromkeys((*KINDS, OTHER), 0.0)
    unnamed: dict[str, float] = {}
    for event in record.key_averages():
        own = event.self_cpu_time_total / 1e6 / repeats
        kind = kind_of(event.key)
        kinds[kind] += own
        if kind == OTHER:
            unnamed[event.key] = own
    return {
        "seconds": statistics.median(seconds),
        "fastest_seconds": min(seconds),
        "by_kind": kinds,
        "largest_others": dict(sorted(unnamed.items(), key=lambda item: -item[1])[:5]),
        "product_flops": flops,
        "flops_per_second": max(rates),
    }


def kind_of(operation: str) -> str:
    """The kind whose part of a name comes first in KINDS."""
    for kind, parts in KINDS.items():
        if any(part in operation for part in parts.split()):
            return kind
    return OTHER


def product_rate(size: int = 1024) -> float:
    """FLOPs per second of a large matrix product."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        torch.mm(left, right)
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times)


def show(title: str, result: dict[str, Any], rate: float) -> None:
    """One table."""
    print(
        f"\n{title}: {result['seconds']:.3f} s; its products alone at "
        f"{rate / 1e9:.0f} GFLOP/s {result['product_floor_seconds']:.3f} s"
    )
    total = sum(result["by_kind"].values())
    rows = [
        [kind, f"{seconds:.3f}", f"{100 * seconds / total:.1f} %"]
        for kind, seconds in sorted(result["by_kind"].items(), key=lambda item: -item[1])
    ]
    print_table(["", "seconds", "share"], rows)
    others = ", ".join(f"{k} {1e3 * v:.0f} ms" for k, v in result["largest_others"].items())
    print(f"other: {others}")


def draw(results: dict[str, Any], path: Path) -> None:
    """A bar for each, divided by kind, and a line at the floor of the products."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.7 * len(results)), layout="constrained")
    axes = figure.add_subplot()
    left = [0.0] * len(results)
    for number, kind in enumerate((*KINDS, OTHER)):
        widths = [result["by_kind"][kind] for result in results.values()]
        axes.barh(list(results), widths, left=left, label=kind, color=f"C{number}")
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, result in enumerate(results.values()):
        floor = result["product_floor_seconds"]
        label = "the products' floor" if place == 0 else None
        axes.plot([floor, floor], [place - 0.4, place + 0.4], color="black", label=label)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=150)
    print(f"drawn to {path}")


if __name__ == "__main__":
    main()
