"""The recurrences of the M layers against the projections of their mixers and Mamba-1's scan.

    python -m benchmarks.recurrent --out build/benchmarks/recurrent.json

Each at the published sizes for one hidden size. Times come as multiples: of the forward and
backward of the mixer's own input and output projections, since an operation that costs less than
the matrix products around it hardly matters, and of Mamba-1's scan. Every ratio is the median over
rounds of the ratio within one.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.measure import environment, interleaved, print_table, write_result
from sambay.ops.gated_delta import gated_delta, l2_normalise
from sambay.ops.selective_scan import selective_scan
from sambay.ops.state_space_dual import state_space_dual
from sambay.spec import RecurrentKind
from sambay.spec.recurrent import published_sizes

PARTS = ("projections", "forward", "forward and backward")


class Case(NamedTuple):
    """One recurrence: `run` maps `inputs`, which all want gradients, to its output."""

    run: Callable[..., Tensor]
    inputs: list[Tensor]
    projections: list[tuple[int, int]]  # (input size, output size)


def leaf(*shape: int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape) + shift).requires_grad_()


def mamba(batch: int, length: int, hidden: int, backend: str | None = None) -> Case:
    """Mamba-1: a state per channel, by the best backend unless one is named."""
    inner, states, rank = 2 * hidden, 16, hidden // 16

    def run(x, delta, A, B, C, D, bias):
        return selective_scan(x, delta, A, B, C, D, delta_bias_E=bias, backend=backend)[0]

    A = -torch.arange(1.0, states + 1).repeat(inner, 1)
    sequences = [leaf(batch, length, inner), leaf(batch, length, inner, shift=-4.0)]
    B, C = leaf(batch, length, states), leaf(batch, length, states)
    inputs = [*sequences, A.requires_grad_(), B, C, leaf(inner), leaf(inner)]
    sizes = [(hidden, 2 * inner), (inner, rank + 2 * states), (rank, inner), (inner, hidden)]
    return Case(run, inputs, sizes)


def mamba_torch(batch: int, length: int, hidden: int) -> Case:
    """Mamba-1 without its C++ kernel, as where there is no compiler."""
    return mamba(batch, length, hidden, "torch")


def mamba2(batch: int, length: int, hidden: int) -> Case:
    """Mamba-2: a matrix per head, by matrix products over chunks."""
    sizes = published_sizes(RecurrentKind.MAMBA2, hidden)
    heads, states = sizes["recurrent_heads"], sizes["d_state"]
    inner = heads * sizes["recurrent_head_dim"]

    def run(x, delta, A, B, C, D, bias):
        return state_space_dual(x, delta, A, B, C, D, delta_bias_H=bias)[0]

    A = -1 - 15 * torch.rand(heads)
    x, delta = leaf(batch, length, heads, inner // heads), leaf(batch, length, heads, shift=-4.0)
    B, C = leaf(batch, length, states), leaf(batch, length, states)
    inputs = [x, delta, A.requires_grad_(), B, C, leaf(heads), leaf(heads)]
    return Case(run, inputs, [(hidden, 2 * inner + 2 * states + heads), (inner, hidden)])


def gated_delta_rule(batch: int, length: int, hidden: int) -> Case:
    """Gated DeltaNet: a matrix per head, by matrix products over chunks."""
    sizes = published_sizes(RecurrentKind.GATED_DELTA, hidden)
    heads, keys, values = (
        sizes[name] for name in ("recurrent_heads", "d_state", "recurrent_head_dim")
    )

    def run(q, k, v, log_decay, beta):
        return gated_delta(q, k, v, log_decay, beta, scale=keys**-0.5)[0]

    q, k = (l2_normalise(leaf(batch, length, heads, keys)) for _ in "qk")
    log_decay = -torch.rand(batch, length, heads)
    beta = 2 * torch.rand(batch, length, heads)
    v = leaf(batch, length, heads, values)
    inputs = [x.detach().requires_grad_() for x in (q, k, v, log_decay, beta)]
    inner = 2 * heads * (keys + values + 1)  # q, k; v and the gate; decay and beta
    return Case(run, inputs, [(hidden, inner), (heads * values, hidden)])


# One row of the table each; all are called with (batch, length, hidden).
CASES: dict[str, Callable[[int, int, int], Case]] = {
    "mamba": mamba,
    "mamba, torch": mamba_torch,
    "mamba2": mamba2,
    "gated_delta": gated_delta_rule,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/recurrent.json"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    functions: dict[str, Callable[[], object]] = {}
    for name, make in CASES.items():
        parts = measured(make(args.batch, args.length, args.hidden), args.batch, args.length)
        functions |= {f"{name}: {part}": parts[part] for part in PARTS}
    seconds = interleaved(functions, rounds=args.rounds, warmup=1)
    results = {name: row(seconds, name) for name in CASES}

    print(
        f"recurrences: B={args.batch} T={args.length} hidden={args.hidden}, {args.threads} threads"
    )
    header = ("", *PARTS, "of projections", "of mamba")
    print_table(
        header,
        [
            (
                name,
                *(f"{1e3 * values[part]:.1f} ms" for part in PARTS),
                f"{values['of the projections']:.2f}",
                f"{values['of mamba']:.2f}",
            )
            for name, values in results.items()
        ],
    )
    settings = vars(args) | {"out": str(args.out)}
    write_result(args.out, {"environment": environment(), "settings": settings, "results": results})


def measured(case: Case, batch: int, length: int) -> dict[str, Callable[[], object]]:
    """The functions to time, by the name of the part."""
    layers = [nn.Linear(wide, out, bias=False) for wide, out in case.projections]
    sequences = [leaf(batch, length, wide) for wide, _ in case.projections]
    output_gradients = [torch.randn(batch, length, out) for _, out in case.projections]
    gradient = torch.randn_like(case.run(*case.inputs))

    def projections() -> None:
        for layer, x, dy in zip(layers, sequences, output_gradients, strict=True):
            torch.autograd.grad(layer(x), [layer.weight, x], dy)

    return {
        "projections": projections,
        "forward": torch.no_grad()(lambda: case.run(*case.inputs)),
        "forward and backward": lambda: torch.autograd.grad(
            case.run(*case.inputs), case.inputs, gradient
        ),
    }


def row(seconds: dict[str, list[float]], name: str) -> dict[str, float]:
    """Median seconds of the parts of one recurrence, and what its training costs by comparison."""
    whole = seconds[f"{name}: forward and backward"]
    bases = {
        "of the projections": f"{name}: projections",
        "of mamba": "mamba: forward and backward",
    }
    ratios = {
        title: statistics.median(
            mine / other for mine, other in zip(whole, seconds[base], strict=True)
        )
        for title, base in bases.items()
    }
    return {part: statistics.median(seconds[f"{name}: {part}"]) for part in PARTS} | ratios


if __name__ == "__main__":
    main()
