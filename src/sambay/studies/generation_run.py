"""Making all measurements of a plan, resumable: one line of a file for each, written as it ends."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from sambay.errors import ConfigError
from sambay.files import write_json
from sambay.generate.memory import available_bytes, readable_bytes, require_slots
from sambay.hf.quantisation import quantise
from sambay.model import LanguageModel
from sambay.spec import ModelConfig
from sambay.spec.footprint import parameter_count
from sambay.studies.generation import GenerationPlan, Key, Lengths, measure
from sambay.studies.progress import Display
from sambay.train.display import duration

PLAN, POINTS = "plan.json", "points.jsonl"


class PointsFile:
    """The measurements of one plan in a folder, in which those of an earlier start are found.

    Raises:
        ConfigError: the folder has measurements of another plan.
    """

    def __init__(
        self, folder: Path, plan: GenerationPlan, configs: Mapping[str, ModelConfig]
    ) -> None:
        self.path = folder / POINTS
        described = plan_values(plan, configs)
        stored = folder / PLAN
        if stored.exists():
            known = json.loads(stored.read_text())
            for name, value in described.items():
                if known.get(name) != value:
                    raise ConfigError(
                        f"{stored}: measured with another {name}; give the same, or another --out"
                    )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(stored, described)
        self.points = self._read()

    def has(self, key: Key) -> bool:
        """Whether this measurement is there."""
        wanted = dataclasses.asdict(key)
        return any(wanted.items() <= point.items() for point in self.points)

    def append(self, point: dict[str, Any]) -> None:
        """Store one more measurement."""
        self.points.append(point)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(point) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a start was killed while it wrote: the next line begins a new one
            with self.path.open("r+b") as file:
                file.truncate(len(whole.encode()))
        return [json.loads(line) for line in whole.splitlines()]


def plan_values(plan: GenerationPlan, configs: Mapping[str, ModelConfig]) -> dict[str, Any]:
    """A plan and its models as plain values."""
    values = json.loads(json.dumps(dataclasses.asdict(plan)))
    return values | {"configs": {name: config.to_dict() for name, config in configs.items()}}


def weight_bytes(plan: GenerationPlan, config: ModelConfig) -> int:
    """The bytes of a model's weights before any of them are quantised."""
    return parameter_count(config) * getattr(torch, plan.dtype).itemsize


def require_memory_for(plan: GenerationPlan, configs: Mapping[str, ModelConfig]) -> None:
    """Refuse a plan of which something cannot fit, before anything is built.

    All models stay in memory, since they take turns.

    Raises:
        NotEnoughMemory: names the slots that would fit beside the weights.
        ConfigError: the weights alone do not fit.
    """
    device = torch.device(plan.device)
    available = available_bytes(device)
    if available is None:
        return
    weights = sum(weight_bytes(plan, config) for config in configs.values())
    if weights >= available:
        raise ConfigError(
            f"--models: their weights need {readable_bytes(weights)}, {readable_bytes(available)} "
            f"are available on {device}; name fewer or smaller ones, or --dtype bfloat16"
        )
    for config in configs.values():
        for lengths in plan.lengths:
            for concurrency in plan.concurrencies:
                require_slots(
                    config,
                    concurrency,
                    plan.capacity(lengths, concurrency),
                    chunk=plan.prefill_chunk,
                    value_bytes=getattr(torch, plan.dtype).itemsize,
                    available=available - weights,
                    device=device,
                )


def build(plan: GenerationPlan, config: ModelConfig) -> LanguageModel:
    """A model with random weights."""
    model = LanguageModel(config).eval().requires_grad_(False)
    model = model.to(device=plan.device, dtype=getattr(torch, plan.dtype))
    return model if plan.weights is None else quantise(model, plan.weights)


def run_plan(
    plan: GenerationPlan,
    configs: Mapping[str, ModelConfig],
    file: PointsFile,
    *,
    display: Display | None = None,
    said: Callable[[str], None] = print,
) -> None:
    """Make the measurements that are missing, models taking turns, and store each as it ends."""
    missing = [key for key in plan.keys if not file.has(key)]
    if not missing:
        return
    models = {name: build(plan, configs[name]) for name in plan.models}
    progress = _Progress(plan, missing, display or Display())
    for key in missing:
        progress.begin(key)
        point = measure(models[key.model], plan, key, advance=progress.advance)
        file.append(point)
        progress.end()
        latency = sum(point["latencies"]) / len(point["latencies"])
        said(
            f"round {key.turn + 1}  {key.lengths:>12}  {key.concurrency:>3} clients  "
            f"{key.model:<20} {point['tokens_per_second']:>9,.1f} tokens/s  {latency:>9.2f} s"
        )


class _Progress:
    """Tokens generated of all that are missing, and when the rest will be done.

    A token costs another time in another measurement; what a model needed per token at a
    concurrency in an earlier round is known, the rest is taken to be as fast as all so far.
    """

    def __init__(self, plan: GenerationPlan, missing: list[Key], display: Display) -> None:
        self._plan, self._display = plan, display
        self._left = {key: self._tokens(key) for key in missing}
        self._total = sum(self._left.values())
        self._known: dict[tuple[str, str, int], float] = {}
        self._done, self._seconds = 0, 0.0
        self._key, self._began, self._count = missing[0], 0.0, 0

    def begin(self, key: Key) -> None:
        self._key, self._began, self._count = key, time.monotonic(), 0

    def advance(self, count: int) -> None:
        self._count += count
        if self._display.is_due:
            share = (self._done + self._count) / self._total
            left = self._seconds_left()
            remaining = "?" if left is None else duration(left)
            self._display.show(
                f"{share:6.1%}  {self._key.model} {self._key.lengths} x {self._key.concurrency}, "
                f"round {self._key.turn + 1}  {remaining} left"
            )

    def end(self) -> None:
        seconds = time.monotonic() - self._began
        tokens = self._left.pop(self._key)
        self._known[self._key.model, self._key.lengths, self._key.concurrency] = seconds / tokens
        self._done, self._seconds = self._done + tokens, self._seconds + seconds
        self._display.close()

    def _seconds_left(self) -> float | None:
        spent = time.monotonic() - self._began
        done = self._done + self._count
        if not done:
            return None
        general = (self._seconds + spent) / done
        whole = sum(
            tokens * self._known.get((key.model, key.lengths, key.concurrency), general)
            for key, tokens in self._left.items()
        )
        return max(0.0, whole - spent)

    def _tokens(self, key: Key) -> int:
        lengths = Lengths.parse(key.lengths)
        return sum(new for _, new in self._plan.pairs(lengths, key.concurrency, key.turn))
