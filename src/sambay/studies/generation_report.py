"""What measurements of generation say together: curves, ratios with intervals, a table."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sambay.studies.generation import GenerationPlan

SAMPLES = 2000
"""Bootstrap samples; each draws whole rounds, in which all models met the same machine."""

Point = Mapping[str, Any]
Rounds = Sequence[int]


class Measured:
    """Measurements by model, lengths, concurrency and round; `rounds` are those that are whole."""

    def __init__(self, plan: GenerationPlan, points: Sequence[Point]) -> None:
        self.plan = plan
        names = ("model", "lengths", "concurrency", "turn")
        self._points = {tuple(point[name] for name in names): point for point in points}
        needed: dict[int, list[tuple[Any, ...]]] = {}
        for key in plan.keys:
            at = (key.model, key.lengths, key.concurrency, key.turn)
            needed.setdefault(key.turn, []).append(at)
        self.rounds = [
            turn for turn, keys in needed.items() if all(k in self._points for k in keys)
        ]

    def at(self, model: str, lengths: str, concurrency: int, turn: int) -> Point:
        """One measurement."""
        return self._points[model, lengths, concurrency, turn]

    def throughput(self, model: str, lengths: str, concurrency: int, rounds: Rounds) -> float:
        """Generated tokens per second: the geometric mean of rounds."""
        rates = [self.at(model, lengths, concurrency, t)["tokens_per_second"] for t in rounds]
        return _geometric(rates)

    def latency(self, model: str, lengths: str, concurrency: int, rounds: Rounds) -> float:
        """Seconds from a request to its last token: the geometric mean over rounds of means."""
        means = [_mean(self.at(model, lengths, concurrency, t)["latencies"]) for t in rounds]
        return _geometric(means)

    def equal_concurrency(
        self, model: str, baseline: str, lengths: str, concurrency: int, rounds: Rounds
    ) -> float:
        """The throughput over the baseline's with as many clients."""
        mine = self.throughput(model, lengths, concurrency, rounds)
        return mine / self.throughput(baseline, lengths, concurrency, rounds)

    def equal_latency(
        self, model: str, baseline: str, lengths: str, concurrency: int, rounds: Rounds
    ) -> tuple[float, bool] | None:
        """The throughput over the baseline's at the latency that this has, and if it is a bound.

        Between its points the model's curve is straight. Behind its last point, where it was not
        slow enough, it has at least that throughput (True); before its first there is no answer.
        """
        goal = self.latency(baseline, lengths, concurrency, rounds)
        curve = sorted(
            (self.latency(model, lengths, c, rounds), self.throughput(model, lengths, c, rounds))
            for c in self.plan.concurrencies
        )
        theirs = self.throughput(baseline, lengths, concurrency, rounds)
        if goal < curve[0][0]:
            return None
        for (low, first), (high, second) in itertools.pairwise(curve):
            if low <= goal <= high:
                share = (goal - low) / (high - low) if high > low else 0.0
                return (first + share * (second - first)) / theirs, False
        return curve[-1][1] / theirs, goal > curve[-1][0]

    def reached(self, model: str, lengths: str, rounds: Rounds) -> dict[int, float]:
        """Mean seconds to each number of generated tokens, over all loads (figure 9)."""
        found: dict[int, list[float]] = {}
        for concurrency in self.plan.concurrencies:
            for turn in rounds:
                point = self.at(model, lengths, concurrency, turn)
                for mark, seconds in point["reached"].items():
                    if seconds:
                        found.setdefault(int(mark), []).append(_mean(seconds))
        return {mark: _mean(values) for mark, values in sorted(found.items())}


def summarise(measured: Measured, baseline: str) -> dict[str, Any]:
    """Curves and ratios to the baseline as plain values; intervals of 95 % from two rounds on."""
    plan, rounds = measured.plan, measured.rounds
    summary: dict[str, Any] = {"baseline": baseline, "rounds": len(rounds), "lengths": {}}
    for lengths in map(str, plan.lengths):
        models: dict[str, Any] = {}
        for model in plan.models:
            points = [
                _summary_point(measured, model, baseline, lengths, c) for c in plan.concurrencies
            ]
            reached = measured.reached(model, lengths, rounds)
            models[model] = {"points": points, "seconds_to_tokens": reached}
        summary["lengths"][lengths] = models
    return summary


def _summary_point(
    measured: Measured, model: str, baseline: str, lengths: str, concurrency: int
) -> dict[str, Any]:
    rounds, at = measured.rounds, (model, lengths, concurrency)
    against = (model, baseline, lengths, concurrency)
    at_latency = measured.equal_latency(*against, rounds)

    def latency_ratio(chosen: Rounds) -> float | None:
        found = measured.equal_latency(*against, chosen)
        return None if found is None else found[0]

    last = measured.at(*at, rounds[-1])
    return {
        "concurrency": concurrency,
        "tokens_per_second": measured.throughput(*at, rounds),
        "tokens_per_second_interval": interval(rounds, lambda r: measured.throughput(*at, r)),
        "latency": measured.latency(*at, rounds),
        "latency_interval": interval(rounds, lambda r: measured.latency(*at, r)),
        "equal_concurrency": measured.equal_concurrency(*against, rounds),
        "equal_concurrency_interval": interval(
            rounds, lambda r: measured.equal_concurrency(*against, r)
        ),
        "equal_latency": None if at_latency is None else at_latency[0],
        "equal_latency_is_bound": False if at_latency is None else at_latency[1],
        "equal_latency_interval": interval(rounds, latency_ratio),
        "cache_bytes": last["cache_bytes"],
        "peak_bytes": last["peak_bytes"],
    }


def interval(rounds: Rounds, value: Callable[[Rounds], float | None]) -> list[float] | None:
    """The middle 95 % of a value over resampled rounds; None of fewer than two, or if it has none.

    All resamples are drawn anew from one seed, so that equal measurements give equal intervals.
    """
    if len(rounds) < 2:
        return None
    chance, known = random.Random(0), {}
    found: list[float] = []
    for _ in range(SAMPLES):
        drawn = tuple(sorted(chance.choices(rounds, k=len(rounds))))
        if drawn not in known:
            known[drawn] = value(drawn)
        if known[drawn] is not None:
            found.append(known[drawn])
    if len(found) < SAMPLES:
        return None
    found.sort()
    return [found[int(0.025 * SAMPLES)], found[int(0.975 * SAMPLES) - 1]]


def markdown(summary: Mapping[str, Any], about: Sequence[str]) -> str:
    """The page: what was measured, and a table for each pair of lengths."""
    lines = ["# Generation under load", "", *about, ""]
    baseline = summary["baseline"]
    for lengths, models in summary["lengths"].items():
        prompt, generated = lengths.split("/")
        lines += [
            f"## {int(prompt):,} prompt and {int(generated):,} generated tokens",
            "",
            f"Ratios are throughput over that of {baseline}, in brackets their 95 % interval over "
            f"{summary['rounds']} rounds.",
            "",
            "| model | clients | tokens/s | latency s | equal clients | equal latency | cache MB |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for model, found in models.items():
            lines += [f"| {model} | {_cells(point)} |" for point in found["points"]]
        marks = sorted({mark for found in models.values() for mark in found["seconds_to_tokens"]})
        lines += ["", "Seconds to so many generated tokens, mean over all loads:", ""]
        lines += [f"| model | {' | '.join(f'{mark:,}' for mark in marks)} |"]
        lines += ["| --- |" + " ---: |" * len(marks)]
        for model, found in models.items():
            seconds = (found["seconds_to_tokens"].get(mark) for mark in marks)
            cells = ("" if value is None else f"{value:.3g}" for value in seconds)
            lines.append(f"| {model} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _cells(point: Mapping[str, Any]) -> str:
    bound = "≥ " if point["equal_latency_is_bound"] else ""
    return " | ".join((
        str(point["concurrency"]),
        f"{point['tokens_per_second']:,.1f}",
        f"{point['latency']:.3g}",
        _ratio(point["equal_concurrency"], point["equal_concurrency_interval"]),
        bound + _ratio(point["equal_latency"], point["equal_latency_interval"]),
        f"{point['cache_bytes'] / 1e6:,.1f}",
    ))  # fmt: skip


def _ratio(value: float | None, ends: Sequence[float] | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" + ("" if ends is None else f" [{ends[0]:.2f}, {ends[1]:.2f}]")


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _geometric(values: Sequence[float]) -> float:
    return math.exp(_mean([math.log(value) for value in values]))
