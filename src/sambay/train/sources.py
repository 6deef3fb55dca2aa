"""The prepared sets of a run, opened: its batches, and the texts it is measured on."""

from __future__ import annotations

from dataclasses import dataclass

from sambay.data.batch_source import BatchSource
from sambay.data.manifest import TRAIN, VALIDATION
from sambay.data.shards import TokenDataset
from sambay.train.config import Packing, RunConfig
from sambay.train.data_checks import validation_folders


@dataclass(frozen=True)
class ValidationSet:
    """The held-out documents of a prepared set; `weight` is its part in the mean over all sets."""

    name: str
    dataset: TokenDataset
    weight: float


def open_batches(config: RunConfig) -> BatchSource:
    """The training batches of a run.

    Raises:
        DataError: a set is missing, damaged or too small.
    """
    data = config.data
    return BatchSource(
        [TokenDataset.open(source.directory, TRAIN) for source in data.sources],
        names=data.source_names,
        weights=[source.weight for source in data.sources],
        sequence_length=data.sequence_length,
        global_batch_size=config.batch.global_batch_size,
        seed=config.seed,
        separate_documents=data.separate_documents,
        whole_documents=data.packing is Packing.BEST_FIT,
    )


def open_validation(config: RunConfig, batches: BatchSource) -> list[ValidationSet]:
    """The validation sets of a run.

    Sets of the training mixture count by their weights there, those of `evaluation.sets` equally.

    Raises:
        DataError: a set is missing or damaged.
    """
    folders = validation_folders(config, [dataset.manifest for dataset in batches.datasets])
    weights = dict.fromkeys(folders, 1.0)
    if not config.evaluation.sets:
        pairs = zip(config.data.source_names, config.data.sources, strict=True)
        weights = {name: source.weight for name, source in pairs if name in folders}
    total = sum(weights.values())
    return [
        ValidationSet(name, TokenDataset.open(folder, VALIDATION), weights[name] / total)
        for name, folder in folders.items()
    ]


def source_metrics(batches: BatchSource, step: int) -> dict[str, float]:
    """The metrics `data/NAME/tokens` and `data/NAME/share` after a number of steps.

    None for a single set, whose share is no news.
    """
    if len(batches.names) == 1:
        return {}
    values: dict[str, float] = {}
    for name, share in batches.shares(step).items():
        values[f"data/{name}/tokens"] = share.tokens
        values[f"data/{name}/share"] = share.share
    return values
