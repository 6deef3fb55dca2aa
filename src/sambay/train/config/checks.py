"""What the sections of a run configuration ask of their fields; every error names the field."""

from __future__ import annotations

import math

from sambay.errors import ConfigError


def check(correct: bool, name: str, value: object, must: str) -> None:
    """Raise a ConfigError that says what the field `name` must be, unless it is `correct`."""
    if not correct:
        raise ConfigError(f"{name} = {value!r}; it must be {must}")


def check_number(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Check one finite number, bounds included."""
    correct = isinstance(value, int | float) and math.isfinite(value) and low <= value <= high
    check(correct, name, value, f"a number from {low:g} to {high:g}")


def check_int(name: str, value: int, minimum: int) -> None:
    """Check one whole number."""
    check(isinstance(value, int) and value >= minimum, name, value, f"a whole number >= {minimum}")


def check_ints(section: str, config: object, **minimums: int) -> None:
    """Check fields of `config` that are whole numbers, each by name with its minimum."""
    for name, minimum in minimums.items():
        check_int(_path(section, name), getattr(config, name), minimum)


def check_optional_ints(section: str, config: object, **minimums: int) -> None:
    """The same for fields that may also be None."""
    given = {name: low for name, low in minimums.items() if getattr(config, name) is not None}
    check_ints(section, config, **given)


def check_not_negative(section: str, config: object, *names: str) -> None:
    """Check fields that are finite numbers of at least 0."""
    for name in names:
        check_number(_path(section, name), getattr(config, name), 0.0)


def check_greater(section: str, config: object, bound: float, *names: str) -> None:
    """Check fields that are finite numbers greater than `bound`."""
    for name in names:
        path, value = _path(section, name), getattr(config, name)
        check_number(path, value, bound)
        check(value > bound, path, value, f"greater than {bound:g}")


def check_shares(section: str, config: object, *names: str) -> None:
    """Check fields from 0 to 1, both included."""
    for name in names:
        check_number(_path(section, name), getattr(config, name), 0.0, 1.0)


def check_shares_below_one(section: str, config: object, *names: str) -> None:
    """Check fields from 0 to 1 that may not be 1."""
    check_shares(section, config, *names)
    for name in names:
        value = getattr(config, name)
        check(value < 1, _path(section, name), value, "less than 1")


def _path(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name
