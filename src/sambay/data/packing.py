"""Whole documents placed in rows so that few are cut and little is left empty.

Best fit, longest document first: each goes into the row with the least room that still holds it.
Only documents longer than a row are cut, into full rows and a rest that is placed like any other.
The plan is a function of the documents' lengths alone; it takes 24 bytes per document.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import pairwise

import numpy as np

from sambay.data.batches import IGNORE
from sambay.data.sampler import samples_at
from sambay.data.shards import TokenDataset
from sambay.errors import DataError


class PackedRows:
    """The rows of a split in which documents are placed whole.

    A document of n tokens, its end-of-sequence token among them, takes n - 1 places of a row: each
    token but the last is an input, each but the first a label. What stays empty at the end of a row
    is a segment of its own whose labels do not count.

    Attributes:
        num_rows: rows of an epoch.
        num_labels: labels of an epoch that count; `num_rows * sequence_length` places hold them.
    """

    def __init__(self, dataset: TokenDataset, sequence_length: int) -> None:
        """Make the plan.

        Raises:
            DataError: no document has two tokens.
        """
        self._dataset = dataset
        self._length = sequence_length
        starts, lengths = _pieces(dataset.document_ends(), sequence_length)
        if not len(starts):
            raise DataError(
                f"the {dataset.split} split of {dataset.folder} has no document of two tokens; "
                "prepare more text"
            )
        rows, self.num_rows = best_fit(lengths, sequence_length)
        order = np.argsort(rows, kind="stable")
        self._starts, self._lengths = starts[order], lengths[order]
        self._firsts = np.searchsorted(rows[order], np.arange(self.num_rows + 1))
        self.num_labels = int(lengths.sum())

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs and labels (int64) and segments (int32) of these rows, each (rows, T)."""
        shape = (len(indices), self._length)
        inputs = np.full(shape, self._dataset.eos_id, np.int64)
        labels = np.full(shape, IGNORE, np.int64)
        segments = np.empty(shape, np.int32)
        for row, index in enumerate(np.asarray(indices).tolist()):
            at, number = 0, 0
            first, last = self._firsts[index], self._firsts[index + 1]
            for start, length in zip(
                self._starts[first:last].tolist(), self._lengths[first:last].tolist(), strict=True
            ):
                tokens = self._dataset.read(start, length + 1)
                inputs[row, at : at + length] = tokens[:-1]
                labels[row, at : at + length] = tokens[1:]
                segments[row, at : at + length] = number
                at, number = at + length, number + 1
            segments[row, at:] = number
        return inputs, labels, segments


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """The row of each item (int64), and the number of rows, of `capacity` places each.

    Items of equal length are placed together, so the work grows with the number of different
    lengths and of different amounts of room, not with that of items.
    """
    # In an order of their own, or neighbours of equal length would meet in the same row.
    shuffled = samples_at(0, np.arange(len(lengths)), len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    sizes = lengths[order]
    borders = [0, *(np.flatnonzero(np.diff(sizes)) + 1).tolist(), len(sizes)]
    rows = np.empty(len(lengths), np.int64)
    num_rows = 0
    rooms: list[int] = []  # the amounts of room there are, ascending
    with_room: dict[int, list[np.ndarray]] = {}

    def put(room: int, which: np.ndarray) -> None:
        if room and len(which):
            if room not in with_room:
                insort(rooms, room)
                with_room[room] = []
            with_room[room].append(which)

    for first, end in pairwise(borders):
        size, at = int(sizes[first]), first
        while at < end:
            place = bisect_left(rooms, size)
            if place < len(rooms):
                room = rooms.pop(place)
                found = np.concatenate(with_room.pop(room))
            else:
                room = capacity
                found = num_rows + np.arange(-(-(end - at) // (room // size)))
                num_rows += len(found)
            # A row that takes one becomes the fullest, and takes more of the same size if it can.
            each = room // size
            used = min(len(found), -(-(end - at) // each))
            taken = min(end - at, used * each)
            rows[order[at : at + taken]] = np.repeat(found[:used], each)[:taken]
            at += taken
            in_last = taken - (used - 1) * each
            put(room - each * size, found[: used - 1])
            put(room - in_last * size, found[used - 1 : used])
            put(room, found[used:])
    return rows, num_rows


def _pieces(ends: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each piece of a document begins, and how many inputs it has (1 to `length`)."""
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    inputs = ends - starts - 1
    counts = -(-inputs // length)
    number = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    piece_starts = np.repeat(starts, counts) + number * length
    return piece_starts, np.minimum(np.repeat(inputs, counts) - number * length, length)
