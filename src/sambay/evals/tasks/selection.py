"""Settings that several suites share, checked in one way."""

from __future__ import annotations

from typing import Any

from sambay.errors import ConfigError, nearest


def chosen(field: str, given: Any, known: tuple[str, ...]) -> tuple[str, ...]:
    """The names that were given, in the order of the known ones, so that order asks nothing else.

    Raises:
        ConfigError: no name, one that is not known, or one given twice.
    """
    if isinstance(given, str) or not isinstance(given, tuple | list) or not given:
        raise ConfigError(f"{field} = {given!r}; give at least one of {', '.join(known)}")
    for name in given:
        if name not in known:
            raise ConfigError(f"{field}: '{name}' is not known{nearest(str(name), known)}")
    if len(set(given)) < len(given):
        raise ConfigError(f"{field} = {list(given)} holds a name twice; leave one of them out")
    return tuple(name for name in known if name in given)


def check_whole(field: str, value: Any, *, least: int) -> None:
    """Make sure that a setting is a whole number.

    Raises:
        ConfigError: it is not, or is below `least`.
    """
    if type(value) is not int or value < least:
        raise ConfigError(f"{field} = {value!r}; it must be a whole number of at least {least}")
