"""What a run directory says about its run: how far it is, and what it measured at the end."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sambay.errors import ConfigError, DataError
from sambay.spec.footprint import parameter_count
from sambay.studies.members import Member
from sambay.train.config import RunConfig
from sambay.train.environment import read_environment
from sambay.train.metrics import readable_metrics
from sambay.train.run_dir import CHECKPOINTS, METRICS, MODEL
from sambay.train.same_run import STATE_FILE, read_state

FINISHED, PENDING, FAILED = "finished", "pending", "failed"
DIVERGED, UNBUILDABLE = "diverged", "unbuildable"
_LAST_LINES = 65_536  # bytes in which the last line of a metrics file is looked for


@dataclass(frozen=True)
class Result:
    """The end of a finished run, and where it was computed.

    loss: nats per token of the validation text; None if it was not a finite number.
    seconds: spent training, over all restarts.
    place: device, threads, versions and operating system of the last start.
    """

    loss: float | None
    bits_per_byte: float | None
    seconds: float
    place: dict[str, Any]


def result_of(run_dir: Path, config: RunConfig) -> Result | None:
    """The result of the run in a directory; None if it has not come to its end.

    The end is the last line of metrics.jsonl and the model, which is written after it. A
    directory that somebody freed of model and checkpoints still counts by its metrics.

    Raises:
        DataError: environment.json is damaged.
    """
    if not (run_dir / METRICS).exists():
        return None
    has_model, has_checkpoints = (run_dir / MODEL).exists(), any(checkpoints(run_dir))
    if has_checkpoints and not has_model:
        return None
    last = next(
        (line for line in reversed(readable_metrics(run_dir)[0]) if "validation_loss" in line), None
    )
    if last is None or last["step"] != config.num_steps:
        return None
    return Result(
        loss=last["validation_loss"],
        bits_per_byte=last.get("validation_bits_per_byte"),
        seconds=float(last["seconds"]),
        place=_place(run_dir),
    )


def steps_done(run_dir: Path) -> tuple[int, float | None]:
    """The last step in metrics.jsonl and its training loss, read from the file's end."""
    try:
        with (run_dir / METRICS).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _LAST_LINES))
            complete = file.read().rpartition(b"\n")[0].rpartition(b"\n")[2]
    except OSError:
        return 0, None
    step = re.search(rb'"step": (\d+)', complete)
    loss = re.search(rb'"loss": ([\d.e+-]+)', complete)
    return int(step[1]) if step else 0, float(loss[1]) if loss else None


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((run_dir / CHECKPOINTS).glob("step-*"))


def check_same_data(run_dir: Path, facts: dict[str, Any]) -> None:
    """Make sure that a run's last checkpoint was trained on the data that is there now.

    Raises:
        ConfigError: it was other data.
        CheckpointMismatch: the checkpoint is damaged.
    """
    found = checkpoints(run_dir)
    if not found or not (found[-1] / STATE_FILE).exists():
        return
    trained_on = [part[:16] for part in read_state(found[-1])["data_manifest"].split(",")]
    if trained_on != facts["data.directory"]:
        raise ConfigError(
            f"data.directory holds other data (manifest {', '.join(facts['data.directory'])}) than "
            f"{run_dir} was trained on (manifest {', '.join(trained_on)}); restore that data, "
            "remove that directory, or use another --out"
        )


def described(member: Member, facts: dict[str, Any] | None) -> dict[str, Any]:
    """The part of a table's row that follows from the configuration alone."""
    row: dict[str, Any] = {
        "name": member.name,
        "architecture": member.architecture,
        "depth": member.depth,
        "seed": member.seed,
        "state": PENDING,
        "reason": "",
    }
    config = member.config
    if config is None:
        return row | {"state": UNBUILDABLE, "reason": member.reason}
    tokens = config.num_steps * config.tokens_per_step
    return row | {
        "width": config.model.hidden_size,
        "parameters": parameter_count(config.model),
        "parameters_without_embeddings": parameter_count(config.model, embeddings=False),
        "steps": config.num_steps,
        "tokens": tokens,
        "flops": member.flops,
        "validation_loss": None,
        "validation_bits_per_byte": None,
        "seconds": None,
        "place": {},
        "peak_learning_rate": config.optimizer.peak_learning_rate,
        "precision": config.precision.value,
        "order_seed": config.seed,
        "data": facts,
    }


def finished_row(row: dict[str, Any], result: Result) -> dict[str, Any]:
    """A row with what was measured; a loss that is no number makes the run a diverged one."""
    row = row | {
        "state": FINISHED,
        "validation_loss": result.loss,
        "validation_bits_per_byte": result.bits_per_byte,
        "seconds": round(result.seconds, 3),
        "place": result.place,
    }
    if result.loss is None:
        return row | {"state": DIVERGED, "reason": "the final validation loss is not finite"}
    return row


def _place(run_dir: Path) -> dict[str, Any]:
    try:
        environment = read_environment(run_dir)
    except DataError:  # nothing but the record is lost
        return {}
    names = ("device", "processes", "threads", "torch", "python", "system", "sambay")
    last = environment.starts[-1] if environment and environment.starts else {}
    return {name: last[name] for name in names if name in last}
