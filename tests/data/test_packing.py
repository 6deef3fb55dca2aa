"""Whole documents in rows: nothing lost, nothing cut without need, little left empty."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sambay.data.batches import IGNORE
from sambay.data.packing import PackedRows, best_fit
from sambay.data.shards import TokenDataset
from sambay.train import loss


@pytest.fixture(scope="module")
def dataset(prepared: Path) -> TokenDataset:
    return TokenDataset.open(prepared, "train")


def slow_best_fit(lengths: list[int], capacity: int) -> int:
    """The number of rows of the definition, one item at a time."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        room = min(fitting, default=capacity)
        if fitting:
            rooms.remove(room)
        rooms.append(room - length)
    return len(rooms)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 40).flatmap(
    lambda capacity: st.tuples(
        st.just(capacity), st.lists(st.integers(1, capacity), min_size=1, max_size=120)
    )
))  # fmt: skip
def test_rows_are_filled_as_by_the_definition(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    rows, count = best_fit(np.array(lengths, np.int64), capacity)
    used = np.bincount(rows, weights=lengths, minlength=count)
    assert len(used) == count == slow_best_fit(lengths, capacity)
    assert used.max() <= capacity
    assert used.min() >= 1


@pytest.mark.parametrize("length", [1, 37, 300, 5000])
def test_every_token_is_a_label_once(dataset: TokenDataset, length: int) -> None:
    """All but the first of each document; and its input is the token before it."""
    packed = PackedRows(dataset, length)
    inputs, labels, segments = packed.read(np.arange(packed.num_rows))
    counted = labels != IGNORE
    documents = [dataset.document(n).tolist() for n in range(dataset.num_documents)]
    expected = sorted(pair for one in documents for pair in pairwise(one))
    found = sorted(zip(inputs[counted].tolist(), labels[counted].tolist(), strict=True))
    assert found == expected
    assert packed.num_labels == len(expected)
    assert (segments[:, 0] == 0).all()
    assert np.isin(np.diff(segments, axis=1), (0, 1)).all()


def test_documents_that_fit_are_whole_and_long_ones_cut_only_when_full(
    dataset: TokenDataset,
) -> None:
    length = 150
    packed = PackedRows(dataset, length)
    inputs, labels, segments = packed.read(np.arange(packed.num_rows))
    pieces = []
    for row in range(packed.num_rows):
        for number in np.unique(segments[row]):
            own = (segments[row] == number) & (labels[row] != IGNORE)
            if own.any():
                pieces.append((inputs[row][own].tolist(), labels[row][own].tolist()))
    expected = []
    for number in range(dataset.num_documents):
        tokens = dataset.document(number).tolist()
        for start in range(0, len(tokens) - 1, length):
            end = min(start + length, len(tokens) - 1)
            expected.append((tokens[start:end], tokens[start + 1 : end + 1]))
    assert sorted(pieces) == sorted(expected)
    assert any(len(one) == length for one, _ in expected)
    # As few rows as there could be, or one in ten more.
    assert packed.num_rows <= 1.1 * -(-packed.num_labels // length)


def test_the_plan_is_the_same_each_time(dataset: TokenDataset) -> None:
    first, second = PackedRows(dataset, 64), PackedRows(dataset, 64)
    rows = np.arange(0, first.num_rows, 3)
    for mine, theirs in zip(first.read(rows), second.read(rows), strict=True):
        assert (mine == theirs).all()


def test_the_label_that_does_not_count_is_that_of_the_loss() -> None:
    assert loss.IGNORE == IGNORE
