"""The run directory: who may write there, what is in it, and whether the disk can hold it.

config.json, tokenizer.json, environment.json, metrics.jsonl, checkpoints/, tensorboard/, wandb/
and, at the end, model/ and summary.html.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sambay.data.manifest import MANIFEST_FILE
from sambay.errors import ConfigError
from sambay.files import WriteFailed, atomic_write, write_json
from sambay.model.folder import TOKENIZER_FILES
from sambay.train.config import RunConfig, read_run_config
from sambay.train.plan import size_text

CONFIG, METRICS, CHECKPOINTS, MODEL = "config.json", "metrics.jsonl", "checkpoints", "model"
ENVIRONMENT, SUMMARY = "environment.json", "summary.html"
TENSORBOARD, WANDB, LOCK = "tensorboard", "wandb", ".lock"


@contextlib.contextmanager
def claimed(run_dir: Path) -> Iterator[None]:
    """Make the directory and hold it until the block, or the process, ends.

    Raises:
        ConfigError: another process trains in it.
        WriteFailed: it cannot be created or written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / LOCK).open("a+")
    except OSError as error:
        raise WriteFailed(
            f"cannot write to the run directory {run_dir}: {error.strerror}; "
            "choose another --run-dir or correct its permissions"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            raise ConfigError(
                f"run directory {run_dir} is in use by process {lock.read().strip() or '?'}; "
                "wait for it, stop it, or choose another --run-dir"
            ) from error
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def check_writable(run_dir: Path) -> None:
    """Make sure that this process can write there, on whatever machine it runs.

    Raises:
        WriteFailed: it cannot.
    """
    try:
        with tempfile.TemporaryFile(dir=run_dir):
            pass
    except OSError as error:
        raise WriteFailed(
            f"cannot write to the run directory {run_dir} on {platform.node()}: {error.strerror}; "
            "all processes need the same directory, with permission to write"
        ) from error


def start_afresh(run_dir: Path) -> None:
    """Remove a previous run's files; anything else in the directory stays.

    Raises:
        ConfigError: the directory holds files of these names but no config.json of a run.
    """
    ours = (METRICS, CHECKPOINTS, MODEL, TENSORBOARD, WANDB, ENVIRONMENT, SUMMARY)
    names = (*ours, *TOKENIZER_FILES, CONFIG)
    if not any((run_dir / name).exists() for name in names):
        return
    read_run_config(run_dir / CONFIG)
    for name in names:  # config.json last: after a kill in between, this can be said again
        path = run_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_head(run_dir: Path, config: RunConfig, data_folder: Path) -> None:
    """Write config.json and a copy of the tokenizer, so that the directory explains itself.

    Raises:
        ConfigError: the directory is a prepared set, or has a config.json of something else.
    """
    if (run_dir / MANIFEST_FILE).exists():
        raise ConfigError(f"{run_dir} holds prepared data; choose another --run-dir")
    if (run_dir / CONFIG).exists():
        read_run_config(run_dir / CONFIG)
    write_json(run_dir / CONFIG, config.to_dict())
    for name in TOKENIZER_FILES:
        source = data_folder / name
        if source.exists():
            with atomic_write(run_dir / name) as file:
                file.write(source.read_bytes())


def require_disk_space(run_dir: Path, checkpoint_bytes: int, keep: int) -> None:
    """Refuse a run whose checkpoints cannot fit.

    Raises:
        ConfigError: less free space than the kept checkpoints, the next one and the model need,
            beyond what is in the directory already.
    """
    needed = checkpoint_bytes * (keep + 1) + checkpoint_bytes // 3
    used = sum(path.stat().st_size for path in run_dir.rglob("*") if path.is_file())
    free = shutil.disk_usage(run_dir).free
    if free + used < needed:
        raise ConfigError(
            f"checkpoint.keep = {keep}: the run needs {size_text(needed)} for checkpoints in "
            f"{run_dir}, {size_text(free)} are free; free some space, keep fewer or choose "
            "another --run-dir"
        )
