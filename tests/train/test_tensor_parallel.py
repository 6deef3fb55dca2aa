"""Several processes that compute one model together, against one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sambay.train.config import ParallelConfig, RunConfig
from tests.train.test_distributed import BATCH, assert_close, make, run

__all__ = ["make"]

MakeConfig = Callable[..., RunConfig]
NAMES = ["transformer++", "sambay", "sambay+da", "mambay", "sambay-a", "sambay-mlp"]


def compare(count: int, tensor: int, config: RunConfig, folder: Path) -> None:
    """Runs of `count` processes in groups of `tensor` against one process."""
    split = replace(config, parallel=ParallelConfig(tensor=tensor))
    assert_close(run(count, split, folder / "split"), run(1, config, folder / "alone"))


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_compute_one_model(name: str, make: MakeConfig, tmp_path: Path) -> None:
    compare(2, 2, make(name, steps=20), tmp_path)
