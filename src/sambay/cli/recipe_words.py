"""The words after `sambay train`: a recipe, its arguments, and overrides. Imports no torch."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from types import NoneType
from typing import Any, get_args

from sambay.cli.overrides import apply_overrides, parse_value
from sambay.errors import ConfigError, nearest
from sambay.recipes.catalogue import Recipe, open_recipe
from sambay.train.config import RunConfig


def configured(text: str, words: Iterable[str]) -> tuple[str, RunConfig]:
    """A short name for the run, and its configuration.

    `words` are `name=value`: arguments of the recipe where it has one of that name, overrides of
    the configuration it gives otherwise. Arguments that were given become part of the run's name,
    so that each has a run directory of its own.

    Raises:
        ConfigError: an unknown recipe, argument or field, or a value that does not fit.
    """
    name, recipe = open_recipe(text)
    accepted = arguments_of(recipe)
    given: dict[str, str] = {}
    overrides = []
    for word in words:
        key, equals, value = word.partition("=")
        key = key.strip()
        if not equals or key not in accepted:
            overrides.append(_checked(word, text, accepted))
        elif key in given:
            raise ConfigError(f"{key} is given twice; leave one of them out")
        else:
            given[key] = value.strip()
    for key, parameter in accepted.items():
        if parameter.default is inspect.Parameter.empty and key not in given:
            raise ConfigError(f"recipe '{text}' needs {key}=VALUE; write it after the recipe")
    values = {key: parse_value(key, value, _type(accepted[key])) for key, value in given.items()}
    config = apply_overrides(recipe(**values), overrides)
    parts = [given[key] for key in accepted if key in given]
    return "-".join([name, *(re.sub(r"[^\w.+]", "_", part) for part in parts)]), config


def arguments_of(recipe: Recipe) -> dict[str, inspect.Parameter]:
    """The arguments of a recipe that the command line can give, by name."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(recipe, eval_str=True).parameters.values()
    return {one.name: one for one in parameters if one.kind in named}


def _checked(word: str, recipe: str, accepted: dict[str, inspect.Parameter]) -> str:
    """An override; a word without a dot that resembles an argument was meant to be one."""
    key, equals, _ = word.partition("=")
    key = key.strip()
    hint = nearest(key, accepted) if accepted and equals and "." not in key else ""
    if "did you mean" in hint:
        raise ConfigError(f"recipe '{recipe}' has no argument '{key}'{hint}")
    return word


def _type(parameter: inspect.Parameter) -> Any:
    """The type to read an argument as; a function of one's own need not declare any."""
    hint = parameter.annotation
    options = [one for one in get_args(hint) or (hint,) if one is not NoneType]
    if hint is inspect.Parameter.empty:
        return str
    known = isinstance(options[0], type) and issubclass(options[0], int | float | str)
    if len(options) == 1 and known:
        return hint
    raise ConfigError(
        f"argument '{parameter.name}' is declared as {hint}; the command line can give numbers, "
        "texts and truth values"
    )
