"""The rules by which a backend is chosen, refused and reported."""

from __future__ import annotations

import logging

import pytest
import torch

from sambay.errors import BackendUnavailable
from sambay.ops import registry


def only_small(call):
    return "made for small numbers" if call is not None and call > 10 else None


@pytest.fixture
def op(monkeypatch):
    monkeypatch.setattr(registry, "_backends", {})
    monkeypatch.setattr(registry, "_logged", set())
    monkeypatch.delenv("SAMBAY_REFERENCE", raising=False)
    registry.register("double", "reference", 0, lambda x: ("reference", x + x))
    registry.register("double", "fast", 20, lambda x: ("fast", 2 * x), only_small)
    registry.register("double", "broken", 30, lambda x: ("broken", 0), lambda call: "no compiler")
    return "double"


def test_the_best_available_backend_for_the_call_is_taken(op):
    assert registry.choose(op, None, 3)(3) == ("fast", 6)
    assert registry.choose(op, None, 30)(30) == ("reference", 60)


def test_a_named_backend_is_taken_even_if_a_better_one_exists(op):
    assert registry.choose(op, "reference", 3)(3) == ("reference", 6)


def test_a_named_backend_that_cannot_serve_the_call_says_why(op):
    with pytest.raises(BackendUnavailable, match="'fast' cannot be used: made for small numbers"):
        registry.choose(op, "fast", 30)


def test_an_unknown_name_suggests_the_nearest(op):
    with pytest.raises(BackendUnavailable, match="did you mean 'reference'"):
        registry.choose(op, "referense", 3)


def test_no_backend_at_all_lists_every_reason(op):
    registry.register(op, "reference", 0, lambda x: x, lambda call: "gone")
    with pytest.raises(BackendUnavailable, match=r"broken: no compiler; fast: .*; reference: gone"):
        registry.choose(op, None, 30)


def test_the_automatic_choice_is_logged_once_with_the_refusals(op, caplog):
    with caplog.at_level(logging.INFO, logger="sambay.ops"):
        registry.choose(op, None, 3)
        registry.choose(op, None, 3)
    assert [r.getMessage() for r in caplog.records] == [
        "double: using backend 'fast' (broken: no compiler)"
    ]


def test_the_environment_forces_the_reference(op, monkeypatch):
    monkeypatch.setenv("SAMBAY_REFERENCE", "1")
    assert registry.choose(op, None, 3)(3)[0] == "reference"
    assert registry.choose(op, "fast", 3)(3)[0] == "reference"


def test_registering_a_name_again_replaces_it(op):
    registry.register(op, "fast", 40, lambda x: ("faster", 2 * x))
    assert registry.choose(op, None, 30)(30) == ("faster", 60)
    assert len(registry._backends[op]) == 3


def test_choosing_can_be_traced(op):
    def run(x):
        return registry.choose(op, None, 3)(x)[1]

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))


def test_the_table_covers_the_operations_of_the_package():
    rows = registry.table()
    assert {("selective_scan", "reference"), ("selective_scan", "torch")} <= {
        (row.op, row.backend) for row in rows if row.available
    }
    assert all(row.available or row.reason for row in rows)
