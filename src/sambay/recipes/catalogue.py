"""Finding a recipe: by name, in a Python file, or in the config.json of an earlier run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

from sambay.errors import ConfigError, nearest
from sambay.recipes import demo, flash, long_context, published, small, small_ladder
from sambay.train.config import RunConfig, read_run_config

Recipe = Callable[..., RunConfig]  # what sets its runs apart from one another are arguments

RECIPES: dict[str, Recipe] = {
    recipe.__name__: recipe
    for recipe in (
        demo.demo_sambay,
        demo.demo_transformer,
        small.sambay_20m,
        small.transformer_20m,
        small_ladder.small_ladder,
        published.sambay_1b,
        published.transformer_1b,
        published.ladder,
        published.data_scaling,
        long_context.prolong_32k,
        flash.phi4_mini_flash,
    )
}


def find_recipe(text: str) -> tuple[str, RunConfig]:
    """A short name for the run and the configuration that the recipe gives without arguments.

    Raises:
        ConfigError: as `open_recipe`.
    """
    name, recipe = open_recipe(text)
    return name, recipe()


def open_recipe(text: str) -> tuple[str, Recipe]:
    """A short name for the run, and the function that makes its configuration.

    `text` is a name in `RECIPES`, `path/to/file.py:function`, or the path of a config.json (or of
    the run directory it is in).

    Raises:
        ConfigError: nothing of the kind exists (suggests the nearest name), or it is no recipe; the
            function itself, when it is called, if it returns none.
    """
    if text in RECIPES:
        return text, RECIPES[text]
    path_text, colon, function = text.rpartition(":")
    if colon and path_text.endswith(".py"):
        return function, _from_file(Path(path_text), function)
    path = Path(text)
    if path.suffix == ".json" or path.is_dir():
        file = path / "config.json" if path.is_dir() else path
        return file.resolve().parent.name, partial(read_run_config, file)
    if path.suffix == ".py":
        raise ConfigError(f"recipe '{text}' names no function; write {text}:FUNCTION")
    raise ConfigError(
        f"unknown recipe '{text}'{nearest(text, RECIPES)}; a recipe is one of these names, "
        "FILE.py:FUNCTION, or the config.json of an earlier run"
    )


def _from_file(path: Path, function: str) -> Recipe:
    if not path.is_file():
        raise ConfigError(f"recipe file {path} does not exist; check the path before ':'")
    specification = importlib.util.spec_from_file_location(f"_recipe_{path.stem}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        raise ConfigError(f"recipe file {path} cannot be imported: {error}") from error
    recipe = getattr(module, function, None)
    if not callable(recipe):
        functions = [name for name, value in vars(module).items() if callable(value)]
        raise ConfigError(f"{path} has no function '{function}'{nearest(function, functions)}")

    @wraps(recipe)
    def checked(*args: Any, **arguments: Any) -> RunConfig:
        config = recipe(*args, **arguments)
        if not isinstance(config, RunConfig):
            raise ConfigError(
                f"{path}:{function} returns {type(config).__name__}; a recipe returns a RunConfig"
            )
        return config

    return checked
