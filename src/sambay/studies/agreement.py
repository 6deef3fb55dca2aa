"""Whether runs can be compared: the same data in the same order, measured on the same text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sambay.data.manifest import Manifest, fingerprint
from sambay.errors import ConfigError
from sambay.studies.members import Member
from sambay.train.config import RunConfig, read_run_config
from sambay.train.data_checks import check_data
from sambay.train.run_dir import CONFIG

# What changes neither what a run learns (but for rounding) nor what is measured at its end.
_FREE = (
    "data.directory",  # the hash of what is in it counts
    "data.verify",
    "batch.micro_batch_size",
    "evaluation.every_steps",
    "checkpoint.",
    "logging.",
    "parallel.",
    "resilience.",
    "activation_checkpointing",
    "compile",
    "device",
    "threads",
)
ORDER_SEED = "seed"


def facts_of(config: RunConfig) -> dict[str, Any]:
    """What must be equal in all runs of a ladder, by the name of the field that decides it.

    Raises:
        DataError, ConfigError: the run cannot use its data.
    """
    manifests = check_data(config)
    sets = {name: _identity(folder) for name, folder in config.evaluation.sets.items()}
    return {
        "data.directory": [_identity(source.directory) for source in config.data.sources],
        "data.mixture": [source.weight for source in config.data.sources],
        "data.tokenizer": [manifest.tokenizer_sha256[:16] for manifest in manifests],
        "data.sequence_length": config.data.sequence_length,
        "data.separate_documents": config.data.separate_documents,
        "data.packing": config.data.packing.value,
        "batch.global_batch_size": config.batch.global_batch_size,
        "model.vocab_size": config.model.vocab_size,
        "evaluation.sets": sets,
        "evaluation.max_tokens": config.evaluation.max_tokens,
        "evaluation.lengths": list(config.evaluation.lengths),
    }


def check_agreement(
    members: Iterable[Member], rows: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The facts of each run that can be built, by name, once all of them agree.

    `rows`: of an existing table, by name; they have to agree too. The order of the data follows
    from the configuration's seed: runs of the same seed of the ladder must have the same.

    Raises:
        ConfigError: names the first field that differs, both runs and both values.
    """
    facts = {one.name: facts_of(one.config) for one in members if one.config is not None}
    all_facts = {name: row["data"] for name, row in rows.items() if row.get("data")} | facts
    orders = {
        name: (row["seed"], row["order_seed"])
        for name, row in rows.items()
        if row.get("order_seed") is not None
    }
    orders |= {one.name: (one.seed, one.config.seed) for one in members if one.config is not None}
    first = next(iter(all_facts))
    for name, mine in all_facts.items():
        for field, value in mine.items():
            _check_equal(field, name, value, first, all_facts[first].get(field, value))
    leaders: dict[int, str] = {}
    for name, (seed, order_seed) in orders.items():
        leader = leaders.setdefault(seed, name)
        _check_equal(ORDER_SEED, name, order_seed, leader, orders[leader][1])
    return facts


def check_same_config(run_dir: Path, config: RunConfig) -> None:
    """Make sure that a run directory, if there is one, holds the run of this configuration.

    Raises:
        ConfigError: it is another run (names the first field that differs, and both values), or
            its config.json is damaged.
    """
    if not (run_dir / CONFIG).exists():
        return
    mine = _comparable(config)
    for field, theirs in _comparable(read_run_config(run_dir / CONFIG)).items():
        if mine[field] != theirs and not field.startswith(_FREE):
            raise ConfigError(
                f"{field} = {mine[field]!r}, but {run_dir} holds a run with {theirs!r}; set it "
                "back, remove that directory, or use another --out"
            )


def _check_equal(field: str, name: str, mine: Any, other: str, theirs: Any) -> None:
    if mine == theirs:
        return
    what = "data order" if field == ORDER_SEED else "data, batch and measurement"
    raise ConfigError(
        f"{field} = {mine!r} in {name}, but {theirs!r} in {other}; losses of a ladder can only be "
        f"compared with the same {what}: let the recipe give all runs the same, or use another "
        "--out for other runs"
    )


def _identity(folder: str) -> str:
    Manifest.read(Path(folder))  # for its explanation of what is missing
    return fingerprint(Path(folder))[:16]


def _comparable(config: RunConfig) -> dict[str, Any]:
    """All fields by name; of the training sets only the weights, since folders may move."""
    values = config.to_dict()
    values["data"]["mixture"] = [source.weight for source in config.data.sources]
    values["evaluation"]["sets"] = sorted(config.evaluation.sets)
    return dict(_flat(values, ""))


def _flat(values: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
