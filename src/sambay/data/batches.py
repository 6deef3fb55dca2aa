"""Batches of windows for training, and all windows of a split in order for evaluation.

Shapes: B rows, T positions. Window i is tokens [i*T, i*T + T + 1): windows share one token, the
label of one and the first input of the next, so that every token but the first is a label once.

Where documents are kept apart (segments), the first token of a document is no label: it follows
the end of another document, and from that it cannot be predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sambay.data.shards import TokenDataset
from sambay.errors import DataError

IGNORE = -100  # a label that counts neither in the loss nor among the tokens


@dataclass(frozen=True)
class Batch:
    """Inputs and the tokens that follow them.

    input_ids, labels: int64 (B, T); a label may be `IGNORE`.
    segments: int32 (B, T), the number of the document within its row, or None if not asked for.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    segments: torch.Tensor | None


@dataclass(frozen=True)
class EvaluationBatch(Batch):
    """A batch of consecutive windows.

    start: position in the split of the first input token; the labels are tokens
        [start + 1, start + 1 + labels.numel()), where they are not `IGNORE`.
    num_labels: the labels that count.
    text_bytes: bytes of text those stand for, for bits per byte.
    """

    start: int
    num_labels: int
    text_bytes: int


def num_windows(dataset: TokenDataset, sequence_length: int) -> int:
    """The number of whole windows of a split, which is the number of samples of an epoch.

    Raises:
        DataError: the split is too short for a single one.
    """
    if sequence_length < 1:
        raise DataError(f"sequence_length is {sequence_length}; it must be at least 1")
    count = (dataset.num_tokens - 1) // sequence_length
    if count < 1:
        raise DataError(
            f"the {dataset.split} split of {dataset.folder} has {dataset.num_tokens} tokens, too "
            f"few for sequence_length {sequence_length}; prepare more text or use a shorter one"
        )
    return count


def read_batch(
    dataset: TokenDataset,
    indices: Sequence[int] | np.ndarray,
    sequence_length: int,
    *,
    segments: bool = False,
) -> Batch:
    """The windows with these indices, in this order.

    With `segments`, each position gets the number of its document within the row: 0 for the first,
    one more after each end-of-sequence token, which itself belongs to the document it ends; its own
    label, the first token of the next document, is `IGNORE`.
    """
    windows = np.empty((len(indices), sequence_length + 1), np.int64)
    for row, index in enumerate(indices):
        windows[row] = dataset.read(int(index) * sequence_length, sequence_length + 1)
    return Batch(*_tensors(windows, dataset.eos_id, segments))


def evaluation_batches(
    dataset: TokenDataset,
    sequence_length: int,
    batch_size: int,
    *,
    segments: bool = False,
    max_windows: int | None = None,
) -> Iterator[EvaluationBatch]:
    """All windows of a split in order, so that each token but the first is a label exactly once.

    With `segments` the first token of each document is no label, as in `read_batch`. The tokens
    left at the end form a last batch with one shorter row. With `max_windows` only the first that
    many whole windows are read.
    """
    total = (dataset.num_tokens - 1) // sequence_length
    rest = (dataset.num_tokens - 1) % sequence_length
    if max_windows is not None and max_windows < total + (rest > 0):
        total, rest = min(total, max_windows), 0
    if total + rest < 1:
        num_windows(dataset, sequence_length)
    for first in range(0, total, batch_size):
        rows = min(batch_size, total - first)
        yield _evaluation_batch(dataset, first * sequence_length, rows, sequence_length, segments)
    if rest:
        yield _evaluation_batch(dataset, total * sequence_length, 1, rest, segments)


def _evaluation_batch(
    dataset: TokenDataset, start: int, rows: int, length: int, segments: bool
) -> EvaluationBatch:
    tokens = dataset.read(start, rows * length + 1).astype(np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length]
    counted = tokens[1:]
    if segments:
        counted = counted[tokens[:-1] != dataset.eos_id]
    return EvaluationBatch(
        *_tensors(windows, dataset.eos_id, segments),
        start=start,
        num_labels=len(counted),
        text_bytes=dataset.tokenizer.count_bytes(counted),
    )


def _tensors(
    windows: np.ndarray, eos_id: int, segments: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    # Copies, since the windows may be views that overlap.
    inputs, labels = windows[:, :-1].copy(), windows[:, 1:].copy()
    numbers = None
    if segments:
        ends = inputs == eos_id
        numbers = torch.from_numpy(np.cumsum(ends, axis=1, dtype=np.int32) - ends)
        labels[ends] = IGNORE
    return torch.from_numpy(inputs), torch.from_numpy(labels), numbers
