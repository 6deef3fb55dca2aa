"""The result of an evaluation, OUT/result.json: the same bytes however often it was interrupted."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sambay.errors import DataError
from sambay.evals.statistics import Metric
from sambay.files import write_json

RESULT = "result.json"
FORMAT_VERSION = 1
_PACKAGES = ("torch", "transformers", "lm_eval", "math-verify", "numpy", "tokenizers")


@dataclass(frozen=True)
class Result:
    """What a model achieved in a suite.

    settings: of the suite, all that decides what is asked and what counts.
    items_sha256: of everything asked, so that two results can be seen to answer the same.
    model: see `Backend.facts`.
    metrics: by name; `NAME@X` is NAME at the length, window or depth X.
    details: more than numbers with errors: groups, histograms, points of curves.
    """

    suite: str
    settings: dict[str, Any]
    items_sha256: str
    model: dict[str, Any]
    metrics: dict[str, Metric]
    details: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write OUT/result.json, with the command and the versions of this process.

        Raises:
            WriteFailed: the operating system refused.
        """
        path = folder / RESULT
        values = {
            "format_version": FORMAT_VERSION,
            "suite": self.suite,
            "command": self.command or spoken_command(),
            "versions": self.versions or versions(),
            "model": self.model,
            "settings": self.settings,
            "items_sha256": self.items_sha256,
            "metrics": {name: metric.to_json() for name, metric in self.metrics.items()},
            "details": self.details,
        }
        write_json(path, values)
        return path


def read_result(path: Path) -> Result:
    """The result in a file, or in the folder of an evaluation.

    Raises:
        DataError: no such file, or not one of these.
    """
    file = path / RESULT if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        version = values["format_version"]
        if version != FORMAT_VERSION:
            raise DataError(
                f"{file}: format_version = {version!r}, this version of sambay reads "
                f"{FORMAT_VERSION}"
            )
        return Result(
            suite=values["suite"],
            settings=values["settings"],
            items_sha256=values["items_sha256"],
            model=values["model"],
            metrics={name: Metric(**metric) for name, metric in values["metrics"].items()},
            details=values["details"],
            command=values["command"],
            versions=values["versions"],
        )
    except FileNotFoundError as error:
        raise DataError(
            f"{file} does not exist; give the {RESULT} of a finished evaluation, or its folder"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} is not the result of an evaluation ({error!r})") from error


def sha256_of_json(value: Any) -> str:
    """A fingerprint of anything JSON can hold, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def spoken_command() -> str:
    """The command line of this process."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Python and the installed packages that numbers depend on."""
    found = {"python": platform.python_version(), "sambay": _installed("sambay") or "source"}
    for name in _PACKAGES:
        version = _installed(name)
        if version is not None:
            found[name] = version
    return found


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def shown(metrics: Mapping[str, Metric]) -> list[str]:
    """One line per metric: name, value, standard error, count."""
    width = max(map(len, metrics), default=0)
    lines = []
    for name, metric in metrics.items():
        error = "" if metric.stderr is None else f" +- {metric.stderr:.4f}"
        lines.append(f"{name:<{width}}  {metric.value:.4f}{error}  (n = {metric.count})")
    return lines
