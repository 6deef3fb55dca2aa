"""Learning-rate sweeps over depths: the runs, and what they say about carrying the rate over."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from sambay.errors import ConfigError
from sambay.spec import Parametrization
from sambay.studies.members import Member
from sambay.studies.optimum import Optimum, Shift, find_optimum, find_shift
from sambay.studies.queue import RUNS
from sambay.studies.results import DIVERGED, FINISHED
from sambay.train.config import RunConfig
from sambay.train.metrics import readable_metrics

Build = Callable[[Parametrization, int, int], RunConfig]  # of depth and seed
FORMAT_VERSION = 1
_LAST_SHARE = 0.1  # of the steps, over which training losses are averaged


class Judged(StrEnum):
    """The loss that says which rate is best."""

    VALIDATION = "validation"  # at the end
    TRAINING = "training"  # the mean over the last tenth of the steps


@dataclass(frozen=True)
class SweepMember(Member):
    """One run of a sweep: the recipe's own rate times `factor`."""

    parametrization: Parametrization = Parametrization.MUP_PLUS_PLUS
    factor: float = 1.0

    @property
    def name(self) -> str:
        """Such as mup++-d8-x0.5-s1."""
        return f"{self.parametrization}-d{self.depth}-x{self.factor:g}-s{self.seed}"


def expand(
    build: Build,
    architecture: str,
    parametrizations: Sequence[Parametrization],
    depths: Sequence[int],
    factors: Sequence[float],
    seeds: Sequence[int],
) -> list[SweepMember]:
    """All runs of a sweep, also those that cannot be built, which say why.

    Raises:
        ConfigError: factors that are no rising positive numbers, something given twice, a recipe
            that makes nothing of the depth, or nothing that can be built.
    """
    if any(not 0 < factor < math.inf for factor in factors) or len(factors) < 2:
        raise ConfigError(f"--factors {_listed(factors)}: give two or more positive numbers")
    for option, values in (
        ("--factors", factors),
        ("--depths", depths),
        ("--seeds", seeds),
        ("--parametrizations", parametrizations),
    ):
        if len(set(values)) < len(values):
            raise ConfigError(f"{option} {_listed(values)}: each only once")
    members: list[SweepMember] = []
    for parametrization in parametrizations:
        for depth in depths:
            for seed in seeds:
                place = (architecture, depth, seed)
                try:
                    config, reason = build(parametrization, depth, seed), ""
                except ConfigError as error:
                    config, reason = None, str(error)
                if config is not None and config.model.num_layers != depth:
                    raise ConfigError(
                        f"--depths {depth}: the recipe gives {config.model.num_layers} layers; it "
                        "must build what its argument depth says"
                    )
                members += [
                    SweepMember(*place, _faster(config, factor), reason, parametrization, factor)
                    for factor in sorted(factors)
                ]
    if all(one.config is None for one in members):
        raise ConfigError(f"no run of this sweep can be built; {members[0].reason}")
    return members


def _listed(values: Sequence[Any]) -> str:
    return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def _faster(config: RunConfig | None, factor: float) -> RunConfig | None:
    if config is None:
        return None
    rate = config.optimizer.peak_learning_rate * factor
    optimizer = dataclasses.replace(config.optimizer, peak_learning_rate=rate)
    return dataclasses.replace(config, optimizer=optimizer)


@dataclass(frozen=True)
class Curve:
    """The losses of one model by rate factor, the mean over seeds; None without a finite loss.

    states: by factor, what became of the runs that are not finished, such as "diverged".
    """

    parametrization: Parametrization
    depth: int
    base_rate: float
    losses: dict[float, float | None]
    states: dict[float, str]

    @property
    def optimum(self) -> Optimum | None:
        return find_optimum(self.losses)


@dataclass(frozen=True)
class Transfer:
    """What a sweep says so far."""

    architecture: str
    judged: Judged
    curves: tuple[Curve, ...]

    @property
    def factors(self) -> list[float]:
        """The grid, ascending."""
        return sorted({factor for curve in self.curves for factor in curve.losses})

    @property
    def shifts(self) -> dict[Parametrization, Shift]:
        """How far the optimum moves over the depths."""
        by: dict[Parametrization, dict[int, Optimum | None]] = {}
        for curve in self.curves:
            by.setdefault(curve.parametrization, {})[curve.depth] = curve.optimum
        return {name: find_shift(optima, self.factors) for name, optima in by.items()}


def collect(
    members: Sequence[SweepMember],
    rows: Mapping[str, Mapping[str, Any]],
    out: Path,
    judged: Judged = Judged.VALIDATION,
) -> Transfer:
    """The curves of a sweep from the rows of its table and the metrics of its runs."""
    grouped: dict[tuple[Parametrization, int], dict[float, list[SweepMember]]] = {}
    for one in members:
        if one.config is not None:
            by_factor = grouped.setdefault((one.parametrization, one.depth), {})
            by_factor.setdefault(one.factor, []).append(one)
    curves = []
    for (parametrization, depth), by_factor in grouped.items():
        losses: dict[float, float | None] = {}
        states: dict[float, str] = {}
        for factor, runs in by_factor.items():
            values = [_loss(one, rows[one.name], out, judged) for one in runs]
            finite = [value for value in values if value is not None]
            losses[factor] = sum(finite) / len(finite) if len(finite) == len(values) else None
            found = {rows[one.name]["state"] for one in runs} - {FINISHED}
            if found:
                states[factor] = DIVERGED if DIVERGED in found else min(found)
        factor, (first, *_) = next(iter(by_factor.items()))
        assert first.config is not None
        rate = first.config.optimizer.peak_learning_rate / factor
        curves.append(Curve(parametrization, depth, rate, losses, states))
    return Transfer(members[0].architecture, judged, tuple(curves))


def _loss(member: SweepMember, row: Mapping[str, Any], out: Path, judged: Judged) -> float | None:
    """The loss of a finished run; None if it has none that is a finite number."""
    if row["state"] != FINISHED:
        return None
    if judged is Judged.VALIDATION:
        return row["validation_loss"]
    assert member.config is not None
    since = member.config.num_steps * (1 - _LAST_SHARE)
    lines = readable_metrics(out / RUNS / member.name)[0]
    last = [line["loss"] for line in lines if line["step"] > since and "loss" in line]
    if not last or any(loss is None for loss in last):
        return None
    return sum(last) / len(last)
