"""`section.field=value` from the command line, typed by the dataclass fields. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Callable, Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from sambay.errors import ConfigError, nearest
from sambay.train.config import RunConfig, value_from_json

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def apply_overrides(config: RunConfig, overrides: Iterable[str]) -> RunConfig:
    """The configuration with all overrides applied at once, so that their order does not matter.

    Raises:
        ConfigError: not of the form `field=value`, an unknown field (suggests the nearest), one
            given twice, a value of another type than the field's (names both), or a combination
            that the configuration refuses.
    """
    changes: dict[str, dict[str, Any]] = {}
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(
                f"'{text}' is not an override; write section.field=value, for example "
                "optimizer.peak_learning_rate=1e-3"
            )
        section, field, hint = _find(path.strip())
        fields = changes.setdefault(section, {})
        if field in fields:
            raise ConfigError(f"{path.strip()} is given twice; leave one of them out")
        fields[field] = parse_value(path.strip(), value.strip(), hint)
    top = changes.pop("", {})
    for section, fields in changes.items():
        old = getattr(config, section)
        # A model knows which of its numbers follow from others.
        replace = getattr(old, "replace", None)
        top[section] = replace(**fields) if replace else dataclasses.replace(old, **fields)
    return dataclasses.replace(config, **top)


def parse_value(name: str, text: str, hint: Any) -> Any:
    """The value a text means for a field of type `hint`.

    Whole numbers may be written 4_096 or 1e6, booleans true/false, an absent value None, lists of
    whole numbers 1,2,4 and of known values a,b. Other lists and tables are given as JSON, or as
    the path of a JSON file.

    Raises:
        ConfigError: names the field, the text and the expected type.
    """
    options, optional = _without_none(hint)
    if optional and text.lower() == "none":
        return None
    if options == tuple[int, ...] and not text.startswith("["):
        return tuple(parse_value(name, part.strip(), int) for part in text.split(","))
    if get_origin(options) is tuple and not text.startswith("["):
        (item, *_) = get_args(options)
        if isinstance(item, type) and issubclass(item, StrEnum):
            return tuple(_member(name, part.strip(), item) for part in text.split(","))
    if get_origin(options) in (tuple, dict):
        return value_from_json(_read_json(name, text), options, name)
    try:
        if isinstance(options, type) and issubclass(options, StrEnum):
            return _member(name, text, options)
        return _READERS[options](text)
    except (ValueError, OverflowError) as error:
        if isinstance(error, ConfigError):
            raise
        wanted = _NAMES[options] + (" or None" if optional else "")
        raise ConfigError(f"{name} = '{text}'; it must be {wanted}") from error


def _read_json(name: str, text: str) -> Any:
    try:
        return json.loads(
            text if text.startswith(("[", "{")) else Path(text).read_text(encoding="utf-8")
        )
    except OSError as error:
        raise ConfigError(
            f"{name} = '{text}' cannot be read: {error.strerror}; give the path of a JSON file"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{name}: {text} is no JSON: {error}") from error


def _find(path: str) -> tuple[str, str, Any]:
    """The section ("" for the top), the field and its type."""
    top = get_type_hints(RunConfig)
    sections = {name: hint for name, hint in top.items() if dataclasses.is_dataclass(hint)}
    known = {
        f"{section}.{field}": hint
        for section, cls in sections.items()
        for field, hint in _field_hints(cls).items()
    } | {name: hint for name, hint in top.items() if name not in sections}
    if path in known:
        section, _, field = path.rpartition(".")
        return section, field, known[path]
    if path in sections:
        fields = ", ".join(name for name in known if name.startswith(f"{path}."))
        raise ConfigError(f"'{path}' is a group of fields; name one of: {fields}")
    section, _, _ = path.partition(".")
    inside = [name for name in known if name.startswith(f"{section}.")]
    raise ConfigError(f"unknown field '{path}'{nearest(path, inside or known)}")


def _field_hints(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {item.name: hints[item.name] for item in dataclasses.fields(cls)}


def _without_none(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) in (Union, types.UnionType):
        rest = [option for option in get_args(hint) if option is not type(None)]
        assert len(rest) == 1, f"a field may be one type or None, not {hint}"
        return rest[0], True
    return hint, False


def _member(name: str, text: str, cls: type[StrEnum]) -> StrEnum:
    values = [member.value for member in cls]
    if text not in values:
        raise ConfigError(f"{name} = '{text}'{nearest(text, values)}")
    return cls(text)


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _truth(text: str) -> bool:
    if text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    raise ValueError(text)


_READERS: dict[Any, Callable[[str], Any]] = {int: _whole, float: _finite, bool: _truth, str: str}
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
