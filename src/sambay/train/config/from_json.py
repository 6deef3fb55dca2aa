"""Sections of a run configuration from what JSON can hold, and the reverse."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from sambay.errors import ConfigError, nearest
from sambay.spec import ModelConfig
from sambay.train.config.checks import check
from sambay.train.config.running import ActivationCheckpointing

_Section = TypeVar("_Section")


def plain_value(value: Any) -> Any:
    """`value` as JSON holds it: sections as objects, tuples as lists, enums as texts."""
    if dataclasses.is_dataclass(value):
        names = [item.name for item in dataclasses.fields(value)]
        return {name: plain_value(getattr(value, name)) for name in names}
    if isinstance(value, tuple):
        return [plain_value(item) for item in value]
    return value.value if isinstance(value, StrEnum) else value


def section_from_json(cls: type[_Section], values: dict[str, Any], prefix: str) -> _Section:
    """A section of type `cls` from a JSON object; absent fields take their defaults.

    Raises:
        ConfigError: an unknown, missing or wrong field, named with `prefix` before it.
    """
    hints = get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise ConfigError(f"unknown field '{prefix}{name}'{nearest(name, hints)}")
    made: dict[str, Any] = {}
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]
        if item.name not in values:
            required = item.default is dataclasses.MISSING
            if required and item.default_factory is dataclasses.MISSING:
                raise ConfigError(f"field '{prefix}{item.name}' is missing")
            continue
        value, hint = values[item.name], hints[item.name]
        made[item.name] = value_from_json(value, hint, f"{prefix}{item.name}")
    return cls(**made)


def value_from_json(value: Any, hint: Any, name: str) -> Any:
    """The value of a field of type `hint` that JSON gives as `value`; errors name the field."""
    if hint is ModelConfig:
        check(isinstance(value, dict), name, value, "a group of fields")
        return ModelConfig.from_dict(value)
    if dataclasses.is_dataclass(hint):
        check(isinstance(value, dict), name, value, "a group of fields")
        assert isinstance(hint, type)
        return section_from_json(hint, value, f"{name}.")
    if get_origin(hint) is tuple:
        check(isinstance(value, list | tuple), name, value, "a list")
        item = get_args(hint)[0]
        return tuple(value_from_json(one, item, f"{name}[{at}]") for at, one in enumerate(value))
    if get_origin(hint) is dict:
        correct = isinstance(value, dict) and all(isinstance(one, str) for one in value.values())
        check(correct, name, value, "an object of names and texts")
        return dict(value)
    if hint is ActivationCheckpointing and isinstance(value, bool):  # as older versions wrote it
        value = ActivationCheckpointing.FULL if value else ActivationCheckpointing.NONE
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        names = [member.value for member in hint]
        if value not in names:
            hint_text = nearest(str(value), names)
            raise ConfigError(f"{name} = {value!r} is not a known value{hint_text}")
        return hint(value)
    if type(None) in get_args(hint):
        return None if value is None else value_from_json(value, get_args(hint)[0], name)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    allowed = {int: int, float: float, bool: bool, str: str}[hint]
    correct = isinstance(value, allowed) and (hint is bool or not isinstance(value, bool))
    check(correct, name, value, str(getattr(hint, "__name__", hint)))
    return value
