"""The sources of all rows: by weight at every prefix, by arithmetic at every place."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sambay.data.mixture import PARTS, Interleave, whole_weights
from sambay.errors import ConfigError

# Proportions of whole numbers, which become weights that sum to 1 but for rounding.
PROPORTIONS = st.lists(st.integers(1, 300), min_size=1, max_size=9)


def weights_of(parts: list[int]) -> list[float]:
    return [part / sum(parts) for part in parts]


@settings(deadline=None, max_examples=150)
@given(PROPORTIONS)
def test_every_prefix_has_each_source_within_one_row_of_its_share(parts: list[int]) -> None:
    mixture = Interleave(weights_of(parts))
    total = sum(parts)
    rows = np.arange(2 * mixture.period + 3)
    sources, before = mixture.assign(rows)
    for source, part in enumerate(parts):
        done = np.cumsum(sources == source)
        # In whole numbers: |done - rows * part / total| < 1.
        assert (np.abs(done * total - (rows + 1) * part) < total).all()
        own = np.flatnonzero(sources == source)
        assert before[own].tolist() == list(range(len(own)))


@settings(deadline=None, max_examples=100)
@given(PROPORTIONS, st.integers(0, 10**15), st.integers(1, 50))
def test_any_place_is_found_without_what_came_before(
    parts: list[int], start: int, count: int
) -> None:
    mixture = Interleave(weights_of(parts))
    sources, before = mixture.assign(start + np.arange(count))
    counts = mixture.counts(start)
    assert counts.sum() == start
    share = [Fraction(part, sum(parts)) for part in parts]
    assert all(abs(int(n) - start * one) < 1 for n, one in zip(counts.tolist(), share, strict=True))
    for source, number in zip(sources.tolist(), before.tolist(), strict=True):
        assert number == counts[source]
        counts[source] += 1
    assert counts.tolist() == mixture.counts(start + count).tolist()


@pytest.mark.parametrize(
    ("weights", "whole"),
    [
        ([1.0], (1,)),
        ([0.7, 0.2, 0.1], (7, 2, 1)),
        ([1 / 3, 1 / 3, 1 / 3], (1, 1, 1)),
        ([0.333333, 0.333333, 0.333333], (1, 1, 1)),
        ([0.522, 0.267, 0.052, 0.042, 0.046, 0.038, 0.033], (522, 267, 52, 42, 46, 38, 33)),
        ([0.999999, 0.000001], (999999, 1)),
    ],
)
def test_weights_mean_what_was_written(weights: list[float], whole: tuple[int, ...]) -> None:
    assert whole_weights(weights) == whole


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(1e-3, 1.0), min_size=2, max_size=9))
def test_odd_weights_are_taken_to_a_millionth(raw: list[float]) -> None:
    weights = [one / sum(raw) for one in raw]
    whole = whole_weights(weights)
    assert sum(whole) <= PARTS
    for one, part in zip(weights, whole, strict=True):
        assert part / sum(whole) == pytest.approx(one, abs=1.001e-6)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.4], "sum to 0.9;"),
        ([0.5, 0.5, 0.1], "sum to 1.1;"),
        ([0.5, 0.500002], "sum to 1.000002;"),
        ([1.5, -0.5], "a weight of -0.5"),
        ([1.0, 0.0], "a weight of 0;"),
        ([float("nan"), 1.0], "a weight of nan"),
    ],
)
def test_weights_that_are_no_shares_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        whole_weights(weights)


def test_the_pattern_is_part_of_the_format() -> None:
    # A change here would change every resumed run.
    sources, _ = Interleave([0.5, 0.3, 0.2]).assign(np.arange(20))
    assert sources.tolist() == GOLDEN * 2


GOLDEN = [0, 1, 0, 2, 0, 1, 0, 1, 0, 2]
