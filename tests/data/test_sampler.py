from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sambay.data.sampler import sample_indices
from sambay.errors import DataError

SIZES = st.integers(1, 700)
SEEDS = st.integers(-(2**70), 2**70)


def epoch(seed: int, number: int, size: int) -> list[int]:
    return sample_indices(seed, number, size, size).tolist()


@settings(deadline=None, max_examples=80)
@given(SEEDS, st.integers(0, 10**12), SIZES)
def test_an_epoch_has_every_sample_once(seed: int, number: int, size: int) -> None:
    assert sorted(epoch(seed, number, size)) == list(range(size))


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.integers(0, 12), st.integers(1, 30), st.integers(3, 90))
def test_batches_are_slices_of_one_endless_line(
    seed: int, step: int, batch: int, size: int
) -> None:
    end = (step + 1) * batch
    line = [index for number in range(end // size + 1) for index in epoch(seed, number, size)]
    found = sample_indices(seed, step, batch, size)
    assert found.dtype == np.int64
    assert found.tolist() == line[step * batch : end]
    assert sample_indices(seed, step, batch, size).tolist() == found.tolist()


def test_epochs_and_seeds_have_their_own_order() -> None:
    orders = {tuple(epoch(seed, number, 50)) for seed in range(20) for number in range(20)}
    assert len(orders) == 400


def test_small_epochs_have_all_orders_about_equally_often() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for number in range(2400):
        order = tuple(epoch(7, number, 4))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    # 100 expected of each, standard deviation 10.
    assert all(50 < count < 150 for count in counts.values())


def test_neighbours_in_the_data_are_not_neighbours_in_an_epoch() -> None:
    order = np.array(epoch(3, 0, 10_000))
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.04
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.04


def test_huge_data_needs_no_table() -> None:
    found = sample_indices(1, 10**9, 4096, 10**15)
    assert len(set(found.tolist())) == 4096
    assert found.min() >= 0
    assert found.max() < 10**15


def test_the_order_is_part_of_the_format() -> None:
    # A change here would change every resumed run.
    assert sample_indices(0, 0, 8, 1000).tolist() == GOLDEN_FIRST
    assert sample_indices(42, 333, 6, 1000).tolist() == GOLDEN_ACROSS_EPOCHS


GOLDEN_FIRST = [594, 712, 158, 164, 244, 233, 463, 659]
GOLDEN_ACROSS_EPOCHS = [527, 934, 663, 960, 528, 648]


@pytest.mark.parametrize(("step", "batch", "size"), [(0, 4, 0), (0, 0, 4), (-1, 4, 4)])
def test_impossible_requests_are_refused(step: int, batch: int, size: int) -> None:
    with pytest.raises(DataError):
        sample_indices(0, step, batch, size)
