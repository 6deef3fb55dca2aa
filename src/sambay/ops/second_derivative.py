"""What operators with a hand-written backward answer when that is differentiated in its turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sambay.errors import BackendUnavailable


def refuse_second_derivative(what: str, instead: str) -> Callable[..., Any]:
    """A backward of a backward that raises BackendUnavailable, naming the backend to use instead.

    Without one torch would take the gradients for constants, and give zero where there is a value.
    """

    def refuse(ctx: Any, *gradients: Any) -> Any:
        raise BackendUnavailable(f"{what} has no second derivative; use backend='{instead}'")

    return refuse
