"""Finding a suite: by name, or in a Python file. Nothing of it is imported before."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, get_type_hints

from sambay.errors import ConfigError, nearest

if TYPE_CHECKING:
    from sambay.evals.calls import Backend
    from sambay.evals.result import Result
    from sambay.evals.runner import Progress


class Evaluation(Protocol):
    """A frozen dataclass whose fields are its options.

    The defaults are a full run. It may also have `pictures(result)`, which returns figures by name.
    """

    def evaluate(
        self, backend: Backend, out: Path, *, on_progress: Progress | None = None
    ) -> Result:
        """The result, written to OUT/result.json; called again it goes on where it was.

        Raises:
            SambayError: options, data or a model that cannot work, before anything is asked.
        """
        ...


@dataclass(frozen=True)
class Entry:
    """Where a suite is, `module:Class`, and what it asks in one line."""

    place: str
    help: str


_SUITES = "sambay.evals.suites"
SUITES = {
    "phonebook": Entry(
        f"{_SUITES}.phonebook:PhonebookSuite",
        "the number of one name in a phone book as long as the context",
    ),
    "ruler": Entry(
        f"{_SUITES}.ruler:RulerSuite", "needles in haystacks of growing length, and their kin"
    ),
    "downstream": Entry(
        f"{_SUITES}.downstream:DownstreamSuite", "short tasks of knowledge and common sense"
    ),
    "chains": Entry(
        f"{_SUITES}.chains:ChainsSuite", "chains of assignments to be followed to their end"
    ),
    "perplexity": Entry(
        f"{_SUITES}.perplexity:PerplexitySuite", "how well long texts are predicted, by position"
    ),
    "reasoning": Entry(
        f"{_SUITES}.reasoning:ReasoningSuite",
        "problems with checked answers, several samples of each",
    ),
}


def open_suite(text: str) -> tuple[str, type[Any]]:
    """A short name for the suite, and its class.

    `text` is a name in `SUITES`, or `path/to/file.py:Class`.

    Raises:
        ConfigError: nothing of the kind exists (suggests the nearest name), or it is no suite.
    """
    if text in SUITES:
        module, _, name = SUITES[text].place.partition(":")
        return text, getattr(importlib.import_module(module), name)
    path_text, colon, name = text.rpartition(":")
    if colon and path_text.endswith(".py"):
        return name, _class_of(_module_from(Path(path_text)), path_text, name)
    if text.endswith(".py"):
        raise ConfigError(f"suite '{text}' names no class; write {text}:CLASS")
    raise ConfigError(
        f"unknown suite '{text}'{nearest(text, SUITES)}; a suite is one of these names, or "
        "FILE.py:CLASS"
    )


def options_of(suite: type[Any]) -> dict[str, Any]:
    """The options of a suite's class with their types."""
    hints = get_type_hints(suite)
    return {field.name: hints[field.name] for field in dataclasses.fields(suite) if field.init}


def is_required(option: dataclasses.Field[Any]) -> bool:
    """Whether an option of a suite has no default."""
    missing = dataclasses.MISSING
    return option.init and option.default is missing and option.default_factory is missing


def _module_from(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"suite file {path} does not exist; check the path before ':'")
    specification = importlib.util.spec_from_file_location(f"_suite_{path.stem}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    # Dataclasses look their own module up by its name.
    sys.modules[module.__name__] = module
    try:
        specification.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        raise ConfigError(f"suite file {path} cannot be imported: {error}") from error
    return module


def _class_of(module: ModuleType, path: str, name: str) -> type[Any]:
    found = getattr(module, name, None)
    if found is None:
        classes = [one for one, value in vars(module).items() if isinstance(value, type)]
        raise ConfigError(f"{path} has no class '{name}'{nearest(name, classes)}")
    if not (dataclasses.is_dataclass(found) and isinstance(found, type)) or not callable(
        getattr(found, "evaluate", None)
    ):
        raise ConfigError(
            f"{path}:{name} is no suite; a suite is a dataclass with a method "
            "evaluate(backend, out, *, on_progress)"
        )
    return found
