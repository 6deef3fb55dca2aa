"""SambaY, the decoder-hybrid-decoder with gated memory units, and its family (arXiv 2507.06607).

The public names are imported on first use, so that `import sambay` is instant and the command line
can answer `--help` without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sambay.hf import register

if TYPE_CHECKING:
    from sambay.errors import SambayError
    from sambay.hf.configuration import Phi4FlashConfig, SambaYConfig
    from sambay.hf.loading import load_model
    from sambay.hf.modeling import Phi4FlashForCausalLM, SambaYForCausalLM
    from sambay.hf.quantisation import quantise
    from sambay.model import LanguageModel, ModelCache
    from sambay.model.init import initialise
    from sambay.spec import ModelConfig, presets

__version__ = "0.1.0"

_HOMES = {
    "LanguageModel": "sambay.model",
    "ModelCache": "sambay.model",
    "ModelConfig": "sambay.spec",
    "Phi4FlashConfig": "sambay.hf.configuration",
    "Phi4FlashForCausalLM": "sambay.hf.modeling",
    "SambaYConfig": "sambay.hf.configuration",
    "SambaYForCausalLM": "sambay.hf.modeling",
    "SambayError": "sambay.errors",
    "initialise": "sambay.model.init",
    "load_model": "sambay.hf.loading",
    "presets": "sambay.spec",
    "quantise": "sambay.hf.quantisation",
}

__all__ = [
    "LanguageModel",
    "ModelCache",
    "ModelConfig",
    "Phi4FlashConfig",
    "Phi4FlashForCausalLM",
    "SambaYConfig",
    "SambaYForCausalLM",
    "SambayError",
    "__version__",
    "initialise",
    "load_model",
    "presets",
    "quantise",
]

register.install()


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
