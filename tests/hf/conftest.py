"""Lets the test mixins of transformers keep their markers: unknown ones are errors here."""

from __future__ import annotations

import pytest

from tests.hf.transformers_source import markers


def pytest_configure(config: pytest.Config) -> None:
    for name in markers():
        config.addinivalue_line("markers", f"{name}: of transformers")
