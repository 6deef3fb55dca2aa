"""The GPU kernels beside their floors, and beside the packages that have the same operation.

    python -m benchmarks.gpu --out build/benchmarks/gpu.json

The scan forwards and backwards against its bytes at the bandwidth of a copy and against its
exponentials, and against mamba_ssm where it is installed; differential decode attention as a share
of the bandwidth, against torch; the product with a gate; one Mamba step. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import environment, print_table, write_result
from sambay.ops import decode, registry
from sambay.ops.gate import gated_product
from sambay.ops.selective_scan import selective_scan

EXPONENTIALS = 16  # per clock and multiprocessor
CLOCK = 1_800_000  # kHz, of an H200, where torch does not say
STATES = 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/gpu.json"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--inner", type=int, default=5120, help="channels of the scan")
    parser.add_argument("--context", type=int, default=32768, help="columns of the cache")
    parser.add_argument("--batch", type=int, default=16, help="rows of a decode step")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu: torch finds no CUDA device; nothing was measured")
        return
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(args.rounds)
    print(f"{torch.cuda.get_device_name()}: a copy moves {bandwidth / 1e12:.2f} TB/s")
    results = {
        f"scan, {rows} x {length} x {args.inner}": scan(
            rows, length, args.inner, bandwidth, args.rounds
        )
        for rows, length in ((1, 32768), (4, 4096), (16, 2048))
    }
    results[f"decode attention, {args.batch} x {args.context}"] = attention(
        args.batch, args.context, bandwidth, args.rounds
    )
    results[f"product with a gate, 16384 x {args.inner}"] = gate(
        16384, args.inner, bandwidth, args.rounds
    )
    results[f"Mamba step, {args.batch} x {args.inner}"] = step(
        args.batch, args.inner, bandwidth, args.rounds
    )
    for title, rows in results.items():
        print(f"\n{title}")
        cells = [
            (name, f"{1e6 * row['seconds']:.1f} us", f"{row['of_floor']:.2f}", row["floor"])
            for name, row in rows.items()
        ]
        print_table(("", "median", "of floor", "floor"), cells)
    settings = vars(args) | {"out": str(args.out), "bandwidth": bandwidth}
    write_result(args.out, {"environment": environment(), "settings": settings, "results": results})


def timed(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median seconds on the device of each function, called in turn in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(-3, rounds):
        for name, function in functions.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            end.synchronize()
            if turn >= 0:
                seconds[name].append(begin.elapsed_time(end) / 1e3)
    return {name: statistics.median(values) for name, values in seconds.items()}


def copy_bandwidth(rounds: int) -> float:
    """Bytes per second that a copy of 1 GiB reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / timed({"copy": lambda: target.copy_(source)}, rounds)["copy"]


def beside_floor(seconds: float, moved: float, bandwidth: float, exponentials: float = 0) -> Any:
    """The time, and how many times the larger of both floors it is."""
    device = torch.cuda.get_device_properties(0)
    clock = 1e3 * getattr(device, "clock_rate", CLOCK)
    per_second = EXPONENTIALS * device.multi_processor_count * clock
    floors = {"bytes": moved / bandwidth, "exponentials": exponentials / per_second}
    floor = max(floors, key=lambda name: floors[name])
    return {
        "seconds": seconds,
        "floors": floors,
        "floor": f"{1e6 * floors[floor]:.1f} us ({floor})",
        "of_floor": seconds / floors[floor],
    }


def scan(rows: int, length: int, channels: int, bandwidth: float, rounds: int) -> dict[str, Any]:
    """Forward, and forward with backward, of every backend that can."""
    half = {"dtype": torch.bfloat16, "device": "cuda"}
    x = torch.randn(rows, length, channels, **half).requires_grad_()
    delta = (torch.randn(rows, length, channels, **half) - 4).requires_grad_()
    B, C = (torch.randn(rows, length, STATES, **half).requires_grad_() for _ in range(2))
    A = -torch.rand(channels, STATES, device="cuda") * STATES
    D, bias = torch.randn(2, channels, device="cuda")
    learned = [x, delta, B, C, A.requires_grad_(), D.requires_grad_(), bias.requires_grad_()]
    dy = torch.randn_like(x)

    def forward(backend: str) -> Tensor:
        return selective_scan(x, delta, A, B, C, D, delta_bias_E=bias, backend=backend)[0]

    def training(backend: str) -> object:
        return torch.autograd.grad(forward(backend), learned, dy)

    names = [
        row.backend
        for row in registry.table()
        if row.op == "selective_scan" and row.available and row.backend in ("triton", "mamba_ssm")
    ]
    with torch.no_grad():
        times = timed(
            {f"{name} forward": lambda name=name: forward(name) for name in names}, rounds
        )
    times |= timed({f"{name} both": lambda name=name: training(name) for name in names}, rounds)
    elements = x.numel()
    return {
        name: beside_floor(
            seconds,
            elements * (6 if name.endswith("forward") else 6 + 10),
            bandwidth,
            elements * STATES * (1 if name.endswith("forward") else 3),
        )
        for name, seconds in times.items()
    }


def attention(rows: int, context: int, bandwidth: float, rounds: int) -> dict[str, Any]:
    """One decode step of Phi-4-mini-flash's attention, differential and plain."""
    heads, key_heads, size = 40, 20, 64
    half = {"dtype": torch.bfloat16, "device": "cuda"}
    q = torch.randn(rows, heads, size, **half)
    k, v = torch.randn(2, rows, key_heads, context, size, **half)
    lengths = torch.full((rows,), context, device="cuda")
    weight, norm_weight = torch.tensor(0.4, device="cuda"), torch.ones(2 * size, device="cuda")
    others = {"scale": size**-0.5, "eps": 1e-5, "factor": 0.2}
    functions = {
        "differential, triton": lambda: decode.decode_differential_attention(
            q, k, v, lengths, weight, norm_weight, **others, backend="triton"
        ),
        "plain, triton": lambda: decode.decode_attention(
            q, k, v, lengths, scale=size**-0.5, backend="triton"
        ),
        "plain, torch": lambda: torch.nn.functional.scaled_dot_product_attention(
            q[:, :, None], k, v, enable_gqa=True
        ),
    }
    moved = 2 * k.numel() * k.element_size()
    times = timed(functions, rounds)
    return {name: beside_floor(seconds, moved, bandwidth) for name, seconds in times.items()}


def gate(rows: int, width: int, bandwidth: float, rounds: int) -> dict[str, Any]:
    """Forward, and forward with backward."""
    a, m = (
        torch.randn(rows, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        for _ in range(2)
    )
    dy = torch.randn_like(a)
    results = {}
    for backend in ("triton", "reference"):
        functions = {
            f"{backend} forward": lambda name=backend: gated_product(a, m, backend=name),
            f"{backend} both": lambda name=backend: torch.autograd.grad(
                gated_product(a, m, backend=name), (a, m), dy
            ),
        }
        for name, seconds in timed(functions, rounds).items():
            tensors = 3 if name.endswith("forward") else 8
            results[name] = beside_floor(seconds, tensors * a.numel() * 2, bandwidth)
    return results


def step(rows: int, channels: int, bandwidth: float, rounds: int) -> dict[str, Any]:
    """One token of a Mamba layer between its two large projections."""
    rank, width = 160, 4
    half = {"dtype": torch.bfloat16, "device": "cuda"}
    parameters = [
        torch.randn(channels, width, **half),
        torch.randn(channels, **half),
        torch.randn(rank + 2 * STATES, channels, **half) * 0.01,
        torch.randn(channels, rank, **half) * 0.01,
        torch.randn(channels, device="cuda") - 4,
        torch.randn(channels, STATES, device="cuda"),
        torch.randn(channels, device="cuda"),
    ]
    u = torch.randn(rows, channels, **half)
    states = {
        "conv_state_BCE": torch.zeros(rows, width - 1, channels, **half),
        "ssm_state_BEN": torch.zeros(rows, channels, STATES, device="cuda"),
    }
    functions = {
        name: lambda name=name: decode.mamba_step(u, *parameters, **states, backend=name)
        for name in ("triton", "reference")
    }
    moved = sum(tensor.numel() * tensor.element_size() for tensor in parameters)
    moved += sum(2 * tensor.numel() * tensor.element_size() for tensor in states.values())
    times = timed(functions, rounds)
    return {name: beside_floor(seconds, moved, bandwidth) for name, seconds in times.items()}


if __name__ == "__main__":
    main()
