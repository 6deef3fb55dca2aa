"""Requests are checked before any work, and grouped into batches."""

from __future__ import annotations

import pytest

from sambay.errors import ConfigError
from sambay.generate import Request
from sambay.generate.requests import plan_batches
from tests.generate.scripted import ScriptedModel
from tests.tiny import VOCAB


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], 3), "prompt 1 is empty"),
        (Request([5, VOCAB, 2], 3), f"prompt 1 holds token id {VOCAB}, .* of {VOCAB}"),
        (Request([5, -1], 3), "prompt 1 holds token id -1"),
        (Request([5], 0), "max_new_tokens is 0; .* at least 1"),
        (Request([5], 2.5), "max_new_tokens is 2.5"),  # pyright: ignore[reportArgumentType]
        (Request([0.5], 2), "not a list of token ids"),  # pyright: ignore[reportArgumentType]
        (Request("text", 2), "not a list of token ids"),  # pyright: ignore[reportArgumentType]
        (Request([[1], [2]], 2), "not a list of token ids"),  # pyright: ignore[reportArgumentType]
        (Request([10**30], 2), "not a list of token ids"),
    ],
)
def test_bad_requests_are_refused_before_any_work(request_: Request, message: str) -> None:
    model = ScriptedModel([1], prompt_length=1)
    engine = model.engine()
    requests = [Request([1], 3), request_]
    for start in (
        engine.generate,
        engine.stream,
        lambda r: engine.generate_many(r, max_batch_size=2),
    ):
        with pytest.raises(ConfigError, match=message):
            start(requests)
    assert model.calls == []


def test_batches_are_planned_by_length_within_the_limits() -> None:
    lengths = [5, 100, 7, 90, 6, 2, 95, 5]
    new_tokens = [10, 10, 500, 10, 10, 10, 10, 20]
    asked: list[tuple[int, int]] = []

    def fits(batch_size: int, columns: int) -> bool:
        asked.append((batch_size, columns))
        return batch_size * columns <= 300

    batches = plan_batches(lengths, new_tokens, 3, fits)
    assert batches == [[1, 6], [3], [2], [4, 7, 0], [5]]
    assert (2, 110) in asked


def test_a_request_that_fits_nowhere_still_gets_its_own_batch() -> None:
    assert plan_batches([9, 3], [1, 1], 8, lambda batch_size, columns: False) == [[0], [1]]
    assert plan_batches([], [], 8, lambda batch_size, columns: True) == []
