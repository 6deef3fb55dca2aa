"""Kernels of packages that may or may not be installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def load_kernel(module: str, name: str, project: str) -> Callable[..., Any] | str:
    """The function `name` of a module, or the reason why there is none, with the remedy.

    `project` is what pip calls the package that the module is of.
    """
    package = module.partition(".")[0]
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:  # one of its own dependencies
            return f"{project} cannot be imported: {error}"
        return f"{project} is not installed; run: pip install {project}"
    except (ImportError, AttributeError) as error:
        return f"{project} cannot be imported: {error}"
