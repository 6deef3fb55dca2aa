"""What several samples of one question say together, against slow and obvious counting."""

from __future__ import annotations

import itertools

import pytest

from sambay.evals.reasoning.samples import (
    Sample,
    by_length,
    classes,
    majority,
    majority_at,
    pass_at,
    powers_of_two,
    quantile,
)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one() -> None:
    right = [True, False, False, True, False, False]
    for k in range(1, 7):
        subsets = list(itertools.combinations(right, k))
        assert pass_at(k, 6, 2) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    assert pass_at(4, 8, 0) == 0
    assert pass_at(4, 8, 8) == 1
    assert powers_of_two(1) == []
    assert powers_of_two(7) == [2, 4]
    assert powers_of_two(64) == [2, 4, 8, 16, 32, 64]


def test_answers_that_mean_the_same_are_one_class() -> None:
    samples = [
        Sample(False, "1/2"), Sample(False, None), Sample(True, "3"), Sample(False, "0.5"),
        Sample(True, "three"), Sample(False, "7"), Sample(False, "0.5"),
    ]  # fmt: skip
    compared: list[tuple[str, str]] = []

    def same(one: str, other: str) -> bool:
        compared.append((one, other))
        return {one, other} == {"1/2", "0.5"}

    assert classes(samples, same) == [0, None, 1, 0, 1, 2, 0]
    assert compared == [("1/2", "0.5"), ("1/2", "7")]  # no answer twice, right ones not at all


def test_majorities() -> None:
    assert majority([None, None]) is None
    assert majority([2, 1, 1]) == 1
    assert majority([None, 2, 1, 1, 2]) == 2  # of equals the first
    right, wrong = Sample(True, "1"), Sample(False, "2")
    samples = [right, wrong, wrong, wrong, right]
    assert majority_at(2, samples, [0, 1, 1, 1, 0]) == 1 / 2  # the fifth fills no group
    assert majority_at(5, samples, [0, 1, 1, 1, 0]) == 0
    assert majority_at(1, [wrong], [None]) == 0


def test_lengths_fall_into_bins() -> None:
    records = [{"num_tokens": tokens, "correct": tokens > 20} for tokens in (1, 16, 17, 33)]
    bins = by_length(records)
    assert [(one["from"], one["to"], one["samples"], one["correct"]) for one in bins][:6] == [
        (0, 3, 1, 0), (3, 6, 0, 0), (6, 9, 0, 0), (9, 12, 0, 0), (12, 15, 0, 0), (15, 18, 2, 0),
    ]  # fmt: skip
    assert bins[-1] == {"from": 33, "to": 36, "samples": 1, "correct": 1}
    assert by_length([{"num_tokens": 0, "correct": False}])[0]["samples"] == 1
    assert quantile([3, 1, 2], 0.5) == 2
    assert quantile([0, 10], 0.95) == pytest.approx(9.5)
    assert quantile([7], 0.95) == 7
