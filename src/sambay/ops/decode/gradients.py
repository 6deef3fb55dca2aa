"""Keeping gradients away from the operations of a decode step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def without_gradients(function: F) -> F:
    """The function under `torch.no_grad`, which itself costs as much as a small operation."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return call  # pyright: ignore[reportReturnType]
