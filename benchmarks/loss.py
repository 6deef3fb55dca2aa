"""Memory and time of the loss over a large vocabulary: plain, torch's fused one, and ours.

`python -m benchmarks.loss --output FILE.json`. Every case runs in a process of its own, forward
and backward once, and reports what it needed beyond what any version needs: the highest resident
memory of the process, less what was resident once hidden states and weight were there, less the
bytes of their two gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import environment, print_table, write_result
from sambay.train.cost import chunk_tokens
from sambay.train.loss import cross_entropy

VOCAB, TOKENS = 200_064, 4096
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def plain(h: Tensor, weight: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """All logits at once."""
    logits = (h @ weight.to(h.dtype).t()).float()
    return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)


def fused(h: Tensor, weight: Tensor, labels: Tensor, smoothing: float, **options: Any) -> Tensor:
    """torch.nn.functional.linear_cross_entropy with its own choice of chunks (torch >= 2.13)."""
    with warnings.catch_warnings(action="ignore"):  # it says when it falls back to all logits
        return F.linear_cross_entropy(
            h,
            weight.to(h.dtype),
            labels,
            reduction="sum",
            label_smoothing=smoothing,
            options=torch.nn.LinearCrossEntropyOptions(**options),
        )


def fused_large(h: Tensor, weight: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """The same with chunks as large as ours."""
    chunk = chunk_tokens(VOCAB)
    return fused(h, weight, labels, smoothing, chunking_method=None, batch_chunk_size=chunk)


def ours(h: Tensor, weight: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """sambay.train.loss."""
    return cross_entropy(h, weight, labels, smoothing=smoothing).objective


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "plain": plain,
    "ours": ours,
    "torch, large chunks": fused_large,
    "torch": fused,
}


def resident_bytes() -> int:
    """What of this process is in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(name: str, width: int, dtype: str, smoothing: float, tokens: int) -> dict[str, Any]:
    """One forward and backward: bytes, seconds, and sums that tell whether results agree."""
    torch.manual_seed(0)
    h = torch.randn(tokens, width).to(DTYPES[dtype]).requires_grad_()
    weight = (torch.randn(VOCAB, width) / width**0.5).requires_grad_()
    labels = torch.randint(VOCAB, (tokens,))
    FUNCTIONS[name](h[:2], weight[:50], labels[:2] % 50, smoothing)  # libraries load, graph dropped
    gradients = sum(x.numel() * x.element_size() for x in (h, weight))
    before = resident_bytes()
    began, processor_began = time.perf_counter(), time.process_time()
    loss = FUNCTIONS[name](h, weight, labels, smoothing)
    (loss / tokens).backward()
    seconds = time.perf_counter() - began
    processor_seconds = time.process_time() - processor_began  # what others do changes it little
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "extra_bytes": peak - before - gradients,
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "loss": float(loss.detach()) / tokens,
        "norms": [float(x.grad.norm()) for x in (h, weight) if x.grad is not None],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/loss.json"))
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 256])
    parser.add_argument("--versions", nargs="+", choices=FUNCTIONS, default=list(FUNCTIONS))
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", help="internal: one case, in this process")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.case:
        print(json.dumps(measure(**json.loads(args.case))))
        return

    results, rows = [], []
    for width in args.widths:
        for dtype, smoothing in (("fp32", 0.0), ("fp32", 0.1), ("bf16", 0.0)):
            reference = None
            for name in args.versions:
                case = {"name": name, "width": width, "dtype": dtype, "smoothing": smoothing}
                command = [sys.executable, "-m", "benchmarks.loss", "--case"]
                command += [json.dumps({**case, "tokens": args.tokens})]
                command += ["--threads", str(args.threads)]
                run = subprocess.run(command, capture_output=True, text=True)
                if run.returncode:
                    print(f"{case}: {run.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
                    continue
                result = json.loads(run.stdout)
                reference = reference or result
                ratio = result["extra_bytes"] / reference["extra_bytes"]
                results.append({**case, **result, "memory_ratio": ratio})
                row = [name, str(width), dtype, f"{smoothing:g}"]
                row += [f"{result['extra_bytes'] / 1e6:,.0f}", f"{ratio:.4f}"]
                row += [f"{result[clock]:.1f}" for clock in ("seconds", "processor_seconds")]
                row += [f"{result['loss']:.6f}"]
                rows.append([*row, "/".join(f"{norm:.5g}" for norm in result["norms"])])
                print(rows[-1], flush=True)
    header = ["version", "D", "dtype", "smoothing", "MB beyond", "of plain", "seconds", "processor"]
    print_table([*header, "loss", "norms"], rows)
    setting = {"vocab_size": VOCAB, "tokens": args.tokens, "threads": args.threads}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_result(args.output, {"environment": environment(), **setting, "results": results})


if __name__ == "__main__":
    main()
