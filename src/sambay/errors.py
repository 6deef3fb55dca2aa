"""Errors a user can cause and cure: one line naming the field or file, and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SambayError(ValueError):
    """Base of all user-facing errors; the command line prints it and exits with code 2."""


class ConfigError(SambayError):
    """A configuration, pattern or command-line value that cannot work."""


class DataError(SambayError):
    """A data source, shard, manifest or tokenizer that is missing, damaged or mismatched."""


class CheckpointMismatch(SambayError):
    """A checkpoint that is damaged or belongs to another configuration."""


class BackendUnavailable(SambayError):
    """An explicitly requested implementation of an operation that cannot serve this call."""


class MissingPackage(SambayError):
    """An optional package is needed for what was asked."""

    def __init__(self, package: str, purpose: str, extra: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed; "
            f'install it with: pip install "sambay[{extra}]"'
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as " (did you mean 'window'?)", or the list of known names if none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else f" (known: {', '.join(names)})"
