"""Timing that survives a noisy machine, and results that say where they come from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sambay.files import write_json
from sambay.ops import registry


def interleaved(
    functions: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int, settling: int = 0
) -> dict[str, list[float]]:
    """Seconds of each function in every round; a round calls each once, in turn.

    A machine that slows down for a while then slows all of them, and the ratio of two times of one
    round means more than the ratio of two medians.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(-warmup, rounds):
        for name, function in functions.items():
            for _ in range(settling):
                function()
            began = time.perf_counter()
            function()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def environment() -> dict[str, Any]:
    """What a number depends on besides the code: versions, commit, processor, threads, load."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sambay": importlib.metadata.version("sambay"),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "backends": {
            f"{row.op}/{row.backend}": row.reason or "available" for row in registry.table()
        },
    }


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result as JSON and say where it went."""
    write_json(path, result)
    print(f"\nwritten to {path}")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under a header, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())


def _commit() -> str:
    folder = Path(__file__).parent
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return run.stdout.strip() or "unknown"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
