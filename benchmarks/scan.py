"""The selective scan and the causal convolution against their slow twins and a mixer's projections.

    python -m benchmarks.scan --out build/benchmarks/scan.json

Times come as multiples: of the native forward, and of the forward and backward of the mixer's four
projections, since a scan that costs less than the matrix products around it no longer matters.
Every ratio is the median over rounds of the ratio within one.

Beware of the loop: each of its thousands of small operations may wake torch's second thread and
wait for it, so on a busy machine it takes 50 times as long as on an idle one. It is therefore
measured with one thread as well, where it does not depend on its neighbours.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.measure import environment, interleaved, print_table, write_result
from sambay.ops.causal_conv import causal_conv, causal_conv_step
from sambay.ops.selective_scan import selective_scan, selective_scan_step

Steps = dict[str, Callable[[], object]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/scan.json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    mixer = Mixer(args.batch, args.length, args.hidden)
    loops = ("native", "reference")
    results = {
        "forward, as a multiple of native": compare(mixer.forwards(), args.rounds, "native"),
        "forward and backward, as a multiple of the four projections'": compare(
            mixer.trainings(), args.rounds, "projections"
        ),
        "one token of eight rows, as a multiple of native": compare(
            mixer.steps(), 10 * args.rounds, "scan native"
        ),
        "the loop's forward": compare({name: mixer.forward(name) for name in loops}, 3, "native"),
        "the loop's forward and backward": compare(
            {name: mixer.training(name) for name in loops}, 1, "native"
        ),
    }
    torch.set_num_threads(1)
    results |= {
        "the loop's forward, one thread": compare(
            {name: mixer.forward(name) for name in loops}, 5, "native"
        ),
        "the loop's forward and backward, one thread": compare(
            {name: mixer.training(name) for name in loops}, 1, "native"
        ),
    }
    torch.set_num_threads(args.threads)
    print(f"scan: B={args.batch} T={args.length} E={2 * args.hidden} N=16, {args.threads} threads")
    for title, rows in results.items():
        print(f"\n{title}")
        cells = [
            (name, f"{1e3 * row['seconds']:.3f} ms", f"{row['ratio']:.3f}")
            for name, row in rows.items()
        ]
        print_table(("", "median", "ratio"), cells)
    settings = vars(args) | {"out": str(args.out)}
    write_result(args.out, {"environment": environment(), "settings": settings, "results": results})


def compare(functions: Steps, rounds: int, base: str) -> dict[str, dict[str, float]]:
    """Median seconds of each function, and its median multiple of `base` within a round."""
    seconds = interleaved(functions, rounds=rounds, warmup=2 if rounds > 3 else 0)
    return {
        name: {
            "seconds": statistics.median(times),
            "ratio": statistics.median(
                mine / other for mine, other in zip(times, seconds[base], strict=True)
            ),
        }
        for name, times in seconds.items()
    }


class Mixer:
    """The inputs of one Mamba-1 mixer: twice the hidden size wide, with 16 states."""

    def __init__(self, batch: int, length: int, hidden: int) -> None:
        inner, states, rank = 2 * hidden, 16, hidden // 16
        sizes = ((hidden, 2 * inner), (inner, rank + 2 * states), (rank, inner), (inner, hidden))
        self.projections = [nn.Linear(wide, out, bias=False) for wide, out in sizes]
        self.inputs = [torch.randn(batch, length, wide, requires_grad=True) for wide, _ in sizes]
        self.output_gradients = [torch.randn(batch, length, out) for _, out in sizes]

        def leaf(*shape: int, shift: float = 0.0) -> Tensor:
            return (torch.randn(shape) + shift).requires_grad_()

        self.x, self.delta = leaf(batch, length, inner), leaf(batch, length, inner, shift=-4.0)
        self.B, self.C = leaf(batch, length, states), leaf(batch, length, states)
        self.A = -torch.arange(1.0, states + 1).repeat(inner, 1)
        self.A.requires_grad_()
        self.D, self.bias = leaf(inner), leaf(inner)
        self.weight = leaf(inner, 4)
        self.dy = torch.randn(batch, length, inner)

    def scan(self, backend: str) -> Tensor:
        y, _ = selective_scan(
            self.x,
            self.delta,
            self.A,
            self.B,
            self.C,
            self.D,
            delta_bias_E=self.bias,
            backend=backend,
        )
        return y

    def conv(self, backend: str) -> Tensor:
        return causal_conv(self.x, self.weight, self.bias, backend=backend)

    def forward(self, backend: str) -> Callable[[], object]:
        return torch.no_grad()(lambda: self.scan(backend))

    def forwards(self) -> Steps:
        """Forward passes without gradient."""
        projections = torch.no_grad()(lambda: [p(x) for p, x in self._pairs()])
        return {
            "native": self.forward("native"),
            "torch": self.forward("torch"),
            "conv native": torch.no_grad()(lambda: self.conv("native")),
            "conv torch": torch.no_grad()(lambda: self.conv("torch")),
            "projections": projections,
        }

    def trainings(self) -> Steps:
        """Forward and backward passes."""
        conv_parameters = [self.x, self.weight, self.bias]

        def projections() -> None:
            for (projection, x), gradient in zip(self._pairs(), self.output_gradients, strict=True):
                torch.autograd.grad(projection(x), [projection.weight, x], gradient)

        def conv(backend: str) -> Callable[[], object]:
            return lambda: torch.autograd.grad(self.conv(backend), conv_parameters, self.dy)

        return {
            "projections": projections,
            "scan native": self.training("native"),
            "scan torch": self.training("torch"),
            "conv native": conv("native"),
            "conv torch": conv("torch"),
        }

    def training(self, backend: str) -> Callable[[], object]:
        parameters = [self.x, self.delta, self.A, self.B, self.C, self.D, self.bias]
        return lambda: torch.autograd.grad(self.scan(backend), parameters, self.dy)

    def steps(self) -> Steps:
        """One token of eight rows."""
        rows = 8
        inner, states = self.A.shape
        x, delta, B, C = (torch.randn(rows, size) for size in (inner, inner, states, states))
        state, earlier = torch.zeros(rows, inner, states), torch.zeros(rows, 3, inner)
        A, D, bias, weight = (t.detach() for t in (self.A, self.D, self.bias, self.weight))
        # A state that is not contiguous is served by plain torch.
        odd_state = torch.zeros(rows, states, inner).transpose(1, 2)
        odd_earlier = torch.zeros(rows, inner, 3).transpose(1, 2)

        def scan(state: Tensor) -> Callable[[], object]:
            return lambda: selective_scan_step(
                x, delta, A, B, C, D, delta_bias_E=bias, state_BEN=state
            )

        def conv(earlier: Tensor) -> Callable[[], object]:
            return lambda: causal_conv_step(x, weight, bias, state_BCE=earlier)

        return {
            "scan native": scan(state),
            "scan torch": scan(odd_state),
            "conv native": conv(earlier),
            "conv torch": conv(odd_earlier),
        }

    def _pairs(self) -> list[tuple[nn.Linear, Tensor]]:
        return list(zip(self.projections, self.inputs, strict=True))


if __name__ == "__main__":
    main()
