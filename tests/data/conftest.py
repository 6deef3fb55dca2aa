"""Sets shared by the tests of a module, since training a tokenizer takes a moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.corpus import make, write_texts


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"), 60)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    """A finished set of several shards in both splits; tests must not change it."""
    out = tmp_path_factory.mktemp("set") / "data"
    make(texts, out)
    return out
