"""The test mixins of transformers, imported from a source tree of it.

The wheel has no tests. A source distribution has those of modelling, but not those of generation
and export, which they import; there, empty classes stand in. A checkout has all.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

VARIABLE = "TRANSFORMERS_SOURCE"
HOW = (
    f"set {VARIABLE} to a checkout or an unpacked source distribution of transformers "
    f"{version('transformers')}, or run `make test-transformers-suite`"
)
_PACKAGE = "transformers_tests"
_STAND_INS = {
    "exporters.test_export": "ExportTesterMixin",
    "generation.test_utils": "GenerationTesterMixin",
}


def unavailable() -> str:
    """Why the mixins cannot be imported, with the remedy; empty if they can."""
    if VARIABLE not in os.environ:
        return f"{VARIABLE} is not set: {HOW}"
    if not _files()[0].exists():
        return f"{_root()} has no tests/test_modeling_common.py: {HOW}"
    found = _version()
    if found and found != version("transformers"):
        return f"{_root()} is transformers {found}: {HOW}"
    return ""


def mixins() -> tuple[ModuleType, list[str]]:
    """The module with both mixins, and which of its classes are empty stand-ins."""
    package = ModuleType(_PACKAGE)
    package.__path__ = [str(_root() / "tests")]
    sys.modules[_PACKAGE] = package
    missing = []
    for (module, name), file in zip(_STAND_INS.items(), _files()[1:], strict=True):
        if not file.exists():
            missing.append(name)
            parent = module.split(".")[0]
            sys.modules[f"{_PACKAGE}.{parent}"] = ModuleType(parent)
            sys.modules[f"{_PACKAGE}.{module}"] = stand_in = ModuleType(module)
            setattr(stand_in, name, type(name, (), {}))
    return importlib.import_module(f"{_PACKAGE}.test_modeling_common"), missing


def markers() -> set[str]:
    """The pytest markers that the mixins use; none if they cannot be imported."""
    if unavailable():
        return set()
    text = "".join(file.read_text(encoding="utf-8") for file in _files() if file.exists())
    return set(re.findall(r"\bmark\.(\w+)", text))


def _files() -> list[Path]:
    modules = ("test_modeling_common", *_STAND_INS)
    return [(_root() / "tests" / Path(*name.split("."))).with_suffix(".py") for name in modules]


def _root() -> Path:
    return Path(os.environ[VARIABLE]).expanduser().resolve()


def _version() -> str:
    for file, pattern in (
        ("PKG-INFO", r"^Version: (\S+)"),
        ("src/transformers/__init__.py", r'^__version__ = "([^"]+)"'),
    ):
        if (_root() / file).exists():
            found = re.search(pattern, (_root() / file).read_text(encoding="utf-8"), re.MULTILINE)
            if found:
                return found[1]
    return ""
