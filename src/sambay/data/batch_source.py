"""The batch of any step, from one prepared set or several: arithmetic, with no state to save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from sambay.data.batches import Batch, num_windows, read_batch
from sambay.data.mixture import Interleave
from sambay.data.packing import PackedRows
from sambay.data.sampler import samples_at, source_seed
from sambay.data.shards import TokenDataset
from sambay.errors import DataError


class Rows(Protocol):
    """The rows of one source; an epoch reads each of them once."""

    num_rows: int

    def read(self, indices: np.ndarray) -> Batch:
        """These rows, in this order."""
        ...


class _Windows:
    """Rows cut from the stream of documents wherever a row is full."""

    def __init__(self, dataset: TokenDataset, sequence_length: int, segments: bool) -> None:
        self.num_rows = num_windows(dataset, sequence_length)
        self._dataset, self._length, self._segments = dataset, sequence_length, segments

    def read(self, indices: np.ndarray) -> Batch:
        return read_batch(self._dataset, indices, self._length, segments=self._segments)


class _Packed:
    """Rows into which documents are placed whole."""

    def __init__(self, dataset: TokenDataset, sequence_length: int) -> None:
        self._rows = PackedRows(dataset, sequence_length)
        self.num_rows = self._rows.num_rows

    def read(self, indices: np.ndarray) -> Batch:
        return Batch(*map(torch.from_numpy, self._rows.read(indices)))


@dataclass(frozen=True)
class SourceShare:
    """What a run has read of one source: tokens, their share of all, and epochs of it."""

    tokens: int
    share: float
    epochs: float


class BatchSource:
    """The global batch of every step, or some of its rows.

    Row r of step n is a function of the seed, the sets, their weights and n * G + r alone. So any
    division of a batch over processes and micro-batches, and any restart, reads the same rows; and
    as long as G stays, so does a change of the number of processes. Within a source, each epoch
    reads every row once, in an order of its own.
    """

    def __init__(
        self,
        datasets: Sequence[TokenDataset],
        *,
        names: Sequence[str],
        weights: Sequence[float],
        sequence_length: int,
        global_batch_size: int,
        seed: int,
        separate_documents: bool = False,
        whole_documents: bool = False,
    ) -> None:
        """Take opened sets with a name and a weight each.

        separate_documents: batches have segments, and no label crosses a document's end.
        whole_documents: rows are packed with whole documents (implies `separate_documents`).

        Raises:
            ConfigError: weights that are no shares of 1.
            DataError: a set is too small for a single row.
        """
        assert len(datasets) == len(names) == len(weights)
        self.datasets = tuple(datasets)
        self.names = tuple(names)
        self.global_batch_size = global_batch_size
        self.sequence_length = sequence_length
        self._seed = seed
        self._interleave = Interleave(weights)
        self._rows: list[Rows] = [
            _Packed(dataset, sequence_length)
            if whole_documents
            else _Windows(dataset, sequence_length, separate_documents)
            for dataset in datasets
        ]

    @property
    def manifest_hash(self) -> str:
        """What the checkpoints keep: the fingerprints of all sets, in order, between commas."""
        return ",".join(dataset.manifest_hash for dataset in self.datasets)

    @property
    def num_rows(self) -> tuple[int, ...]:
        """The rows an epoch of each source has."""
        return tuple(rows.num_rows for rows in self._rows)

    def sample_indices(self, step: int, rows: slice | None = None) -> tuple[np.ndarray, np.ndarray]:
        """For each row of a step: the number of its source, and its row there; int64 both.

        Raises:
            DataError: a negative step.
        """
        if step < 0:
            raise DataError(f"step is {step}; it must be at least 0")
        places = np.arange(self.global_batch_size)[rows if rows is not None else slice(None)]
        sources, before = self._interleave.assign(step * self.global_batch_size + places)
        samples = np.empty_like(before)
        for source in np.unique(sources).tolist():
            own = sources == source
            seed = source_seed(self._seed, source)
            samples[own] = samples_at(seed, before[own], self._rows[source].num_rows)
        return sources, samples

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """The global batch of a step (counted from 0), or the rows of it that `rows` selects."""
        sources, samples = self.sample_indices(step, rows)
        found = np.unique(sources).tolist()
        if len(found) == 1:
            return self._rows[found[0]].read(samples)
        parts = [self._rows[source].read(samples[sources == source]) for source in found]
        order = np.concatenate([np.flatnonzero(sources == source) for source in found])
        # Row i of the batch is where `order` says i.
        back = torch.from_numpy(np.argsort(order, kind="stable"))
        segments = [part.segments for part in parts if part.segments is not None]
        return Batch(
            torch.cat([part.input_ids for part in parts])[back],
            torch.cat([part.labels for part in parts])[back],
            torch.cat(segments)[back] if segments else None,
        )

    def shares(self, step: int) -> dict[str, SourceShare]:
        """What the first `step` steps have read of each source."""
        total = step * self.global_batch_size
        counts = self._interleave.counts(total).tolist()
        return {
            name: SourceShare(
                count * self.sequence_length, count / max(total, 1), count / rows.num_rows
            )
            for name, count, rows in zip(self.names, counts, self._rows, strict=True)
        }
