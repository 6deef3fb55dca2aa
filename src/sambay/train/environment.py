"""Where a run was computed: one entry in RUN_DIR/environment.json for each time it was started."""

from __future__ import annotations

import datetime
import json
import os
import platform
import secrets
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sambay
from sambay.errors import DataError
from sambay.files import write_json
from sambay.train.distributed import World
from sambay.train.run_dir import ENVIRONMENT
from sambay.train.throughput import Gauges, device_name


@dataclass(frozen=True)
class Environment:
    """run_id: given when the run began, different for every run. starts: oldest first."""

    run_id: str
    starts: list[dict[str, Any]]


def record_start(run_dir: Path, world: World, gauges: Gauges, step: int) -> Environment:
    """What is known of the run after adding this start, which continues from `step`.

    Raises:
        WriteFailed: the operating system refused.
        DataError: the file is damaged (names it).
    """
    known = read_environment(run_dir) or Environment(secrets.token_hex(4), [])
    now = datetime.datetime.now(datetime.UTC)
    start = {
        "time": now.isoformat(timespec="seconds"),
        "step": step,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "sambay": sambay.__version__,
        "commit": source_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": device_name(world.device),
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "flops_per_token": gauges.flops_per_token,
        "peak_flops": gauges.peak_flops,
    }
    environment = Environment(known.run_id, [*known.starts, start])
    values = {"run_id": environment.run_id, "starts": environment.starts}
    write_json(run_dir / ENVIRONMENT, values)
    return environment


def read_environment(run_dir: Path) -> Environment | None:
    """What was recorded of a run; None if nothing was.

    Raises:
        DataError: the file is damaged (names it).
    """
    path = run_dir / ENVIRONMENT
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        starts = values["starts"]
        if not all(isinstance(start, dict) for start in starts):
            raise TypeError("starts")
        return Environment(str(values["run_id"]), list(starts))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(f"{path} is damaged; remove it, nothing but the record is lost") from error


def source_commit() -> str | None:
    """The commit of the checkout this package runs from, "+changes" if it was edited since.

    None for an installed package, whose version says the same.
    """
    root = Path(sambay.__file__).parents[2]
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    if not commit:
        return None
    is_changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if is_changed else commit


def _git(root: Path, *words: str) -> str:
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        result = subprocess.run(
            ["git", "-C", str(root), *words],
            capture_output=True, text=True, timeout=20, check=False, env=environment,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
