"""Every test starts from the same seeds, with one thread, and with poisoned empty tensors."""

from __future__ import annotations

import signal

import pytest
import torch

# A shell starts what runs in its background with ^C ignored, and every child inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _deterministic_start() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tiny tensors: a second thread only costs
    # torch then also fills uninitialised memory with NaN: reading it shows instead of hiding.
    torch.use_deterministic_algorithms(True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
