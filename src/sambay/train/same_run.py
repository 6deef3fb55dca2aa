"""Whether a checkpoint belongs to a run: its configuration and its data, field by field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sambay.errors import CheckpointMismatch, ConfigError
from sambay.train.config import RunConfig

STATE_FILE = "state.json"
FORMAT_VERSION = 2

# Fields that change no result (or its rounding only): a run may continue with other values.
_FREE = (
    "data.directory",
    "data.verify",
    "batch.micro_batch_size",
    "evaluation.",
    "checkpoint.",
    "logging.",
    "parallel.",
    "resilience.",
    "activation_checkpointing",
    "compile",
    "device",
    "threads",
)
_SCHEDULE = ("optimizer.", "schedule.", "regularisation.")


def check_same_run(
    path: Path, config: RunConfig, manifest_hash: str, *, change_schedule: bool = False
) -> dict[str, Any]:
    """The state of a checkpoint that belongs to this configuration and data.

    `change_schedule` permits other values in `optimizer`, `schedule` and `regularisation` than
    the checkpoint's.

    Raises:
        CheckpointMismatch: another configuration (names the first differing field and both
            values), other data, or a damaged state.json.
    """
    state = read_state(path)
    allowed = _FREE + _SCHEDULE if change_schedule else _FREE
    _check_same_config(path, state["config"], config, allowed)
    # The sets of a mixture have their hashes in its order, between commas.
    stored, mine = state["data_manifest"].split(","), manifest_hash.split(",")
    for number, (theirs, hash_now) in enumerate(zip(stored, mine, strict=True)):
        if theirs != hash_now:
            folder = config.data.sources[number].directory
            name = f"data.mixture: {folder!r}" if len(mine) > 1 else f"data.directory = {folder!r}"
            raise CheckpointMismatch(
                f"{name} holds other data (manifest {hash_now[:12]}) than {path} was trained on "
                f"(manifest {theirs[:12]}); restore that data or use another --run-dir"
            )
    return state


def read_state(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's state.json.

    Raises:
        CheckpointMismatch: the file is missing, damaged or of another format.
    """
    file = path / STATE_FILE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        version = state["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointMismatch(
            f"{file} is missing or damaged ({error}); remove {path} to use an earlier checkpoint"
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointMismatch(
            f"{file}: format_version = {version!r}, this version of sambay reads {FORMAT_VERSION}"
        )
    return state


def stored_config(path: Path, values: dict[str, Any]) -> RunConfig:
    """The configuration in a checkpoint's state.

    Raises:
        CheckpointMismatch: another version wrote it, or it is damaged.
    """
    try:
        return RunConfig.from_dict(values)
    except ConfigError as error:
        raise CheckpointMismatch(f"{path / STATE_FILE}: {error}") from error


def _check_same_config(
    path: Path, stored: dict[str, Any], config: RunConfig, allowed: tuple[str, ...]
) -> None:
    mine = _comparable(config)
    for name, theirs in _comparable(stored_config(path, stored)).items():
        if mine[name] != theirs and not name.startswith(allowed):
            hint = ", or continue with --change-schedule" if name.startswith(_SCHEDULE) else ""
            raise CheckpointMismatch(
                f"{name} = {mine[name]!r}, but {path} was made with {theirs!r}; "
                f"set it back, or use another --run-dir or --fresh{hint}"
            )


def _comparable(config: RunConfig) -> dict[str, Any]:
    """All fields by name; of the training sets only the weights, since folders may move."""
    values = config.to_dict()
    values["data"]["mixture"] = [source.weight for source in config.data.sources]
    return _flat(values)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
