"""Fixtures of the generation tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory checks that do not depend on the machine the tests run on."""
    for module in ("memory", "engine", "slot_engine"):
        name = f"sambay.generate.{module}.available_bytes"
        monkeypatch.setattr(name, lambda device: 1 << 40)


@pytest.fixture(autouse=True)
def _one_thread(_deterministic_start: None) -> None:
    """Thousands of tiny steps: handing each to a second thread costs more than it saves."""
    torch.set_num_threads(1)
