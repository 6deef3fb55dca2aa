"""`sambay doctor`: versions, devices, compiler, and every operation with its backends."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

HELP = "show versions, devices, and which backend serves each operation and why"

# package: (extra that brings it, what it is for)
PACKAGES = {
    "torch": ("", "everything"),
    "numpy": ("", "token shards"),
    "safetensors": ("", "weights"),
    "tokenizers": ("data", "tokenizers"),
    "pyarrow": ("data", "parquet sources"),
    "zstandard": ("data", ".zst sources"),
    "tqdm": ("data", "progress bars"),
    "tensorboard": ("train", "training curves"),
    "matplotlib": ("train", "pictures"),
    "trackio": ("track", "training curves"),
    "wandb": ("track", "training curves"),
    "transformers": ("hf", "its classes and trainers"),
    "jinja2": ("hf", "chat templates"),
    "accelerate": ("hf", "models over several devices"),
    "peft": ("finetune", "adapters"),
    "trl": ("finetune", "fine-tuning"),
    "torchao": ("finetune", "quantised loading"),
}


class Line(NamedTuple):
    """One line of the report: a name, what was found, and a remark."""

    name: str
    value: str
    remark: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `sambay doctor`."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report; always 0, since a missing option is information, not a failure."""
    report = build_report()
    print(json.dumps(report, indent=2) if args.json else _render(report))
    return 0


def build_report() -> dict[str, list[dict[str, Any]]]:
    """The report by section, as plain values."""
    import sambay
    from sambay.ops import registry

    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    sections = {
        "environment": [
            Line("sambay", sambay.__version__, str(Path(sambay.__file__).parent)),
            Line("python", platform.python_version(), sys.executable),
            Line("system", system),
        ],
        "packages": [_package(name) for name in PACKAGES],
        "devices": _devices(),
        "compiler": _compiler(),
    }
    report = {name: [line._asdict() for line in lines] for name, lines in sections.items()}
    report["operations"] = [row._asdict() for row in registry.table()]
    return report


def _package(name: str) -> Line:
    extra, purpose = PACKAGES[name]
    try:
        return Line(name, importlib.metadata.version(name), purpose)
    except importlib.metadata.PackageNotFoundError:
        return Line(name, "missing", f'{purpose}: pip install "sambay[{extra}]"')


def _devices() -> list[Line]:
    import torch

    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} processors"
    lines = [Line("cpu", f"{cpu_name()}, {threads}", _memory())]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        lines.append(Line(f"cuda:{index}", properties.name, memory))
    if torch.cuda.device_count() == 0:
        built = torch.version.cuda is not None
        lines.append(
            Line("cuda", "none", "no device found" if built else "this torch is for CPU only")
        )
    if torch.backends.mps.is_available():
        lines.append(Line("mps", "available"))
    return lines


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _memory() -> str:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return ""
    return f"{size / 2**30:.1f} GiB memory"


def _compiler() -> list[Line]:
    """The compiler that would build the kernels, and whether they are built and load."""
    from sambay.ops.native import builder, library

    lines = []
    words = shlex.split(os.environ.get("CXX", ""))
    candidates = [words[0]] if words else ["c++", "g++", "clang++"]
    path = next(filter(None, map(shutil.which, candidates)), None)
    if path is None:
        lines.append(Line("c++", "none", builder.REMEDY))
    else:
        lines.append(Line("c++", path, _first_line([path, "--version"])))
    reason = library.why_unavailable()
    lines.append(Line("kernels", "ready" if reason is None else "none", reason or ""))
    files = sorted(builder.cache_root().glob("*/kernels-*.so"))
    size = sum(file.stat().st_size for file in files)
    cached = f"{len(files)} build{'s' * (len(files) != 1)}, {size / 2**10:.0f} KiB"
    lines.append(Line("cache", cached, str(builder.cache_root())))
    return lines


def _first_line(command: list[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run: {error}"
    return next(iter(result.stdout.splitlines()), "")


def _render(report: dict[str, list[dict[str, Any]]]) -> str:
    lines: list[str] = []
    for title, rows in report.items():
        lines += ["", title.capitalize()]
        if title != "operations":
            cells = [(row["name"], row["value"], row["remark"]) for row in rows]
        else:
            cells = [_operation(row, rows) for row in rows]
        widths = [max(len(cell[column]) for cell in cells) for column in range(2)]
        for first, second, rest in cells:
            lines.append(f"  {first:<{widths[0]}}  {second:<{widths[1]}}  {rest}".rstrip())
    return "\n".join(lines[1:])


def _operation(row: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[str, str, str]:
    """One backend; the operation is named on its first line, and what is taken first is marked."""
    siblings = [other for other in rows if other["op"] == row["op"]]
    best = next((other for other in siblings if other["available"]), None)
    name = row["op"] if row is siblings[0] else ""
    state = "available" if row["available"] else f"unavailable: {row['reason']}"
    return name, row["backend"], state + (", used by default" if row is best else "")
