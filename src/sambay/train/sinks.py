"""Tools that show a run's numbers while it goes on; each package is imported in this file only.

metrics.jsonl is the record. A sink gets the same numbers, and one that fails is left behind: it
never ends a run.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sambay.errors import MissingPackage, SambayError
from sambay.train.config import LoggingConfig, RunConfig, Sink

# sink: (module, extra)
_PACKAGES = {
    Sink.TENSORBOARD: ("tensorboard", "train"),
    Sink.TRACKIO: ("trackio", "track"),
    Sink.WANDB: ("wandb", "track"),
}


class SinkFailed(SambayError):
    """A sink could not be opened."""


class MetricsSink(Protocol):
    """What a tool is told."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The finite values of a step; steps may repeat after a run went back."""

    def close(self) -> None:
        """No more values follow."""


@dataclass(frozen=True)
class SinkRun:
    """How a run presents itself to its sinks.

    run_id: the same whenever it is continued, and different for every run.
    next_step: the first step that will be written; what a sink has of later ones is out of date.
    """

    run_dir: Path
    run_id: str
    config: RunConfig
    next_step: int

    @property
    def project(self) -> str:
        return self.config.logging.project

    @property
    def name(self) -> str:
        """For people: the folder it is in, and what makes it different."""
        return f"{self.run_dir.resolve().name}-{self.run_id}"


def require_sinks(config: LoggingConfig) -> None:
    """Refuse to begin if a package is missing that a sink needs.

    Raises:
        MissingPackage: names the package and how to install it.
    """
    for sink in config.all_sinks:
        package, extra = _PACKAGES[sink]
        if not _is_installed(package):
            raise MissingPackage(package, f"logging.sinks: {sink.value}", extra)


def open_sinks(run: SinkRun) -> dict[str, MetricsSink]:
    """The sinks of a run by name, ready to be written.

    Raises:
        MissingPackage: names the package and how to install it.
        SinkFailed: a sink refused.
    """
    logging = run.config.logging
    require_sinks(logging)
    opened: dict[str, MetricsSink] = {}
    for sink in logging.all_sinks:
        try:
            opened[sink.value] = _OPENERS[sink](run)
        except Exception as error:  # each tool has errors of its own; all are told in one line
            for other in opened.values():
                other.close()
            raise SinkFailed(
                f"logging.sinks: {sink.value} could not be opened: {_first_line(error)}; correct "
                "that or leave it out"
            ) from error
    return opened


def describe_failure(name: str, error: Exception) -> str:
    """What a person is told when a sink fails during a run."""
    return (
        f"warning: {name} takes no more numbers ({_first_line(error)}); training goes on, "
        "metrics.jsonl has them all"
    )


class _TensorBoard:
    def __init__(self, run: SinkRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        from sambay.train.run_dir import TENSORBOARD  # with torch, which a dry run goes without

        # Events of steps that the run is going to do again are dropped by the reader.
        self._writer = SummaryWriter(str(run.run_dir / TENSORBOARD), purge_step=run.next_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    def __init__(self, run: SinkRun) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self._run: Any = trackio.init(
            project=run.project, name=run.name, config=run.config.to_dict(), resume="allow"
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _Wandb:
    def __init__(self, run: SinkRun) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self._run: Any = wandb.init(
            project=run.project,
            name=run.name,
            id=run.run_id,
            resume="allow",
            dir=str(run.run_dir),
            config=run.config.to_dict(),
            mode=os.environ.get("WANDB_MODE", "offline"),
        )
        # Its own step counter only rises, so a run that went back would be ignored.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


_OPENERS: dict[Sink, Callable[[SinkRun], MetricsSink]] = {
    Sink.TENSORBOARD: _TensorBoard,
    Sink.TRACKIO: _Trackio,
    Sink.WANDB: _Wandb,
}


def _is_installed(package: str) -> bool:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # the second: it is in sys.modules, without a specification
        return False
    # A folder of that name in the current directory, such as wandb leaves behind, is no package.
    is_folder = spec is not None and spec.origin is None and spec.submodule_search_locations
    return spec is not None and not is_folder


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
