"""Makes the Auto classes of transformers know our models, without importing transformers.

`import sambay` must stay fast and work without transformers. So registration waits: it runs right
after transformers' own module of Auto classes is imported, or at once if it already is.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

OLDEST_TRANSFORMERS = (5, 17)
CONFIGURATIONS = "transformers.models.auto.configuration_auto"
MODELS = "transformers.models.auto.modeling_auto"

_log = logging.getLogger("sambay.hf")


def install() -> None:
    """Register now where transformers' Auto classes are loaded, and later where they are not.

    A second call does nothing.
    """
    if any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _AfterImport())
    for name, action in _ACTIONS.items():
        if name in sys.modules:
            _attempt(action, sys.modules[name])


def _register_configurations(module: ModuleType) -> None:
    from sambay.hf.configuration import Phi4FlashConfig, SambaYConfig

    for config in (SambaYConfig, Phi4FlashConfig):
        module.AutoConfig.register(config.model_type, config, exist_ok=True)


def _register_models(module: ModuleType) -> None:
    from sambay.hf import modeling

    importlib.import_module(CONFIGURATIONS)
    for base, causal in (
        (modeling.SambaYModel, modeling.SambaYForCausalLM),
        (modeling.Phi4FlashModel, modeling.Phi4FlashForCausalLM),
    ):
        module.AutoModel.register(base.config_class, base, exist_ok=True)
        module.AutoModelForCausalLM.register(causal.config_class, causal, exist_ok=True)
        # `transformers serve` looks the name in `architectures` up in the package itself.
        setattr(sys.modules["transformers"], causal.__name__, causal)


_ACTIONS: dict[str, Callable[[ModuleType], None]] = {
    CONFIGURATIONS: _register_configurations,
    MODELS: _register_models,
}


def _attempt(action: Callable[[ModuleType], None], module: ModuleType) -> None:
    """Run an action; transformers itself must stay usable whatever we find."""
    version = sys.modules["transformers"].__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRANSFORMERS:
        _warn_of_age(version)
        return
    try:
        action(module)
    except ImportError as error:
        _log.warning("the Auto classes of transformers will not know SambaY models: %s", error)


@functools.cache
def _warn_of_age(version: str) -> None:
    """Once, although there is more than one action."""
    oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
    _log.warning(
        "transformers %s is older than %s; its Auto classes will not know SambaY models. "
        'Upgrade with: pip install "transformers>=%s"',
        version,
        oldest,
        oldest,
    )


class _AfterImport(MetaPathFinder):
    """Lets the usual finder find the modules of `_ACTIONS`, and adds the action to the loading."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _ACTIONS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ActingLoader(spec.loader, _ACTIONS[fullname])
        return spec


class _ActingLoader(Loader):
    """The module's own loader, and the action afterwards."""

    def __init__(self, inner: Loader, action: Callable[[ModuleType], None]) -> None:
        self._inner, self._action = inner, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        _attempt(self._action, module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
