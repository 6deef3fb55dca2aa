"""Every test starts from the same seeds, with two threads, and with poisoned empty tensors."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _deterministic_start(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    # Uninitialised memory that is read shows up as NaN instead of as luck.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
