"""Throughput and latency of long generation under load: what is measured, and one measurement.

The experiment of arXiv 2507.06607, figures 4 and 9: so many clients, each of which sends its next
request as soon as the last is answered. Lengths are normal with a given spread, the same for every
model; the weights are random, which costs the same as any others.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from sambay.errors import ConfigError
from sambay.generate import Request, SlotEngine
from sambay.generate.memory import slots_bytes
from sambay.model import LanguageModel
from sambay.spec import ModelConfig

MARKS = (1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Parts of the mean generation at which the time since the request is noted (figure 9)."""


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Mean tokens of a prompt and of what is generated behind it."""

    prompt: int
    generated: int

    def __str__(self) -> str:
        return f"{self.prompt}/{self.generated}"

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """The lengths of a text such as 2000/32000.

        Raises:
            ConfigError: not two whole numbers of 1 or more.
        """
        parts = text.split("/")
        if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise ConfigError(f"lengths '{text}': write PROMPT/GENERATED, such as 2000/32000")
        return cls(int(parts[0]), int(parts[1]))

    def divided(self, divisor: int) -> Lengths:
        """The same proportions at a smaller scale."""
        return Lengths(max(1, self.prompt // divisor), max(1, self.generated // divisor))


@dataclasses.dataclass(frozen=True)
class GenerationPlan:
    """Everything that is measured; the same plan asks every model for the same lengths.

    requests: per measurement, in multiples of the concurrency.
    spread: standard deviation of the lengths over their mean; they stay within two of these.
    weights: "int8" or "int4" for the matrices of the layers; None leaves them in `dtype`.
    """

    models: tuple[str, ...]
    lengths: tuple[Lengths, ...]
    concurrencies: tuple[int, ...]
    requests: int = 2
    rounds: int = 3
    spread: float = 0.3
    seed: int = 0
    dtype: str = "float32"
    weights: str | None = None
    device: str = "cpu"
    prefill_chunk: int = 2048

    def __post_init__(self) -> None:
        for name in ("models", "lengths", "concurrencies"):
            if not getattr(self, name):
                raise ConfigError(f"{name}: empty; name at least one")
        for name, value in (
            ("concurrency", min(self.concurrencies)), ("requests", self.requests),
            ("rounds", self.rounds), ("prefill_chunk", self.prefill_chunk),
        ):  # fmt: skip
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if not 0 <= self.spread < 0.5:
            raise ConfigError(f"spread is {self.spread}; it must be at least 0 and below 0.5")
        if len(set(self.models)) < len(self.models):
            raise ConfigError("models: one is named twice; leave one of them out")

    @property
    def numbers(self) -> str:
        """What the models compute in, in words."""
        return self.dtype if self.weights is None else f"{self.dtype} with {self.weights} weights"

    @property
    def keys(self) -> Iterator[Key]:
        """Every measurement, in the order in which they are made: models take turns."""
        for turn in range(self.rounds):
            for lengths in self.lengths:
                for concurrency in self.concurrencies:
                    for model in self.models:
                        yield Key(model, str(lengths), concurrency, turn)

    def pairs(self, lengths: Lengths, concurrency: int, turn: int) -> list[tuple[int, int]]:
        """Tokens of every request's prompt and continuation in one measurement."""
        chance = random.Random(f"{self.seed}/{lengths}/{concurrency}/{turn}")

        def draw(mean: int) -> int:
            factor = chance.gauss(1.0, self.spread)
            low, high = 1 - 2 * self.spread, 1 + 2 * self.spread
            return max(1, round(mean * min(max(factor, low), high)))

        count = self.requests * concurrency
        return [(draw(lengths.prompt), draw(lengths.generated)) for _ in range(count)]

    def capacity(self, lengths: Lengths, concurrency: int) -> int:
        """Columns of a slot that every request of any round fits."""
        return max(
            prompt + new - 1
            for turn in range(self.rounds)
            for prompt, new in self.pairs(lengths, concurrency, turn)
        )

    def slots_bytes(self, config: ModelConfig, lengths: Lengths, concurrency: int) -> int:
        """Memory planned for one measurement besides the weights."""
        value_bytes = getattr(torch, self.dtype).itemsize
        capacity = self.capacity(lengths, concurrency)
        return slots_bytes(
            config, concurrency, capacity, chunk=self.prefill_chunk, value_bytes=value_bytes
        )


@dataclasses.dataclass(frozen=True)
class Key:
    """Which measurement."""

    model: str
    lengths: str
    concurrency: int
    turn: int


def measure(
    model: LanguageModel,
    plan: GenerationPlan,
    key: Key,
    *,
    clock: Callable[[], float] = time.perf_counter,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """One measurement as plain values: seconds, tokens, and the latency of every request.

    advance: called with the number of tokens after every step.
    """
    lengths = Lengths.parse(key.lengths)
    pairs = plan.pairs(lengths, key.concurrency, key.turn)
    device = model.head_weight.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    engine = SlotEngine(
        model,
        slots=key.concurrency,
        capacity=plan.capacity(lengths, key.concurrency),
        prefill_chunk=plan.prefill_chunk,
    )
    chance = random.Random(f"{plan.seed}/{key.lengths}/{key.turn}/ids")
    vocab_size = model.config.vocab_size
    requests = [Request(_ids(chance, prompt, vocab_size), new) for prompt, new in pairs]
    engine.generate([Request(_ids(chance, 2, vocab_size), 1)])  # builds what is built once
    watch = _Watch(lengths, clock)
    following = iter(requests)
    started = clock()
    for request in requests[: key.concurrency]:
        watch.sent(engine.submit(next(following)), request)
    while events := engine.step():
        now = clock()
        for event in events:
            ended = watch.produced(event.request, now)
            if ended and (request := next(following, None)) is not None:
                watch.sent(engine.submit(request), request)
        advance(len(events))
    seconds = clock() - started
    generated = sum(new for _, new in pairs)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        **dataclasses.asdict(key),
        "seconds": seconds,
        "requests": len(pairs),
        "prompt_tokens": sum(prompt for prompt, _ in pairs),
        "generated_tokens": generated,
        "tokens_per_second": generated / seconds,
        "prefill_seconds": engine.timings.prefill_seconds,
        "decode_seconds": engine.timings.decode_seconds,
        "latencies": watch.latencies,
        "reached": watch.reached,
        "cache_bytes": engine.cache_bytes,
        "peak_bytes": peak,
        "step_mode": engine.step_mode,
    }


class _Watch:
    """The seconds from sending each request to its last token, and to the marks before."""

    def __init__(self, lengths: Lengths, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._marks = sorted({max(1, round(part * lengths.generated)) for part in MARKS})
        self._began: dict[int, float] = {}
        self._left: dict[int, int] = {}
        self._count: dict[int, int] = {}
        self.latencies: list[float] = []
        self.reached: dict[str, list[float]] = {str(mark): [] for mark in self._marks}

    def sent(self, number: int, request: Request) -> None:
        assert request.max_new_tokens is not None
        self._began[number], self._count[number] = self._clock(), 0
        self._left[number] = request.max_new_tokens

    def produced(self, number: int, now: float) -> bool:
        """Whether that token was the request's last."""
        self._count[number] += 1
        seconds = now - self._began[number]
        if str(self._count[number]) in self.reached:
            self.reached[str(self._count[number])].append(seconds)
        if self._count[number] < self._left[number]:
            return False
        self.latencies.append(seconds)
        return True


def _ids(chance: random.Random, count: int, vocab_size: int) -> Sequence[int]:
    return chance.choices(range(vocab_size), k=count)
