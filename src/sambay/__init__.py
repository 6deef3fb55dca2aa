"""SambaY, the decoder-hybrid-decoder with gated memory units, and its family (arXiv 2507.06607).

The public names are imported on first use, so that `import sambay` is instant and the command line
can answer `--help` without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sambay.errors import SambayError
    from sambay.model import LanguageModel, ModelCache
    from sambay.model.init import initialise
    from sambay.spec import ModelConfig, presets

__version__ = "0.1.0"

_HOMES = {
    "LanguageModel": "sambay.model",
    "ModelCache": "sambay.model",
    "ModelConfig": "sambay.spec",
    "SambayError": "sambay.errors",
    "initialise": "sambay.model.init",
    "presets": "sambay.spec",
}

__all__ = [
    "LanguageModel",
    "ModelCache",
    "ModelConfig",
    "SambayError",
    "__version__",
    "initialise",
    "presets",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sambay' has no attribute '{name}'")
    home = importlib.import_module(_HOMES[name])
    try:
        return getattr(home, name)
    except AttributeError:  # a module of that package
        return importlib.import_module(f"{_HOMES[name]}.{name}")


def __dir__() -> list[str]:
    return __all__
