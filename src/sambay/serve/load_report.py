"""Measured levels of several servers: side by side, at equal latency, as table and picture."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sambay.plots.curves import Curve, Panel, draw_panels
from sambay.serve.load import Level, Server, Workload, run_level

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Levels = Mapping[str, Sequence[Level]]
_FEWEST_REQUESTS = 4


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The first server against another one: how many times its throughput.

    by_concurrency: at each level both have.
    at_equal_latency: at each time per token of the other's levels that lies within the first's
        range; the first's throughput there is read off its curve.
    """

    other: str
    by_concurrency: Mapping[int, float]
    at_equal_latency: Sequence[tuple[float, float]]


def measure(
    servers: Sequence[Server],
    workload: Workload,
    concurrencies: Sequence[int],
    *,
    requests: int | None,
    rounds: int,
    tell: Callable[[str], None],
    run: Callable[[Server, Workload, int], Level] = run_level,
) -> dict[str, list[Level]]:
    """The levels of every server, which take turns; of several rounds the fastest counts.

    requests: of each level; None for twice the concurrency.

    Raises:
        LoadFailed: a level of which nothing was answered.
    """
    warm = dataclasses.replace(workload, requests=1, new_tokens=min(8, workload.new_tokens))
    for server in servers:
        run(server, warm, 1)
    levels: dict[str, list[Level]] = {server.name: [] for server in servers}
    number = 0
    for concurrency in concurrencies:
        count = requests or max(2 * concurrency, _FEWEST_REQUESTS)
        readings: dict[str, list[Level]] = {server.name: [] for server in servers}
        for _ in range(rounds):
            number += 1
            # Other prompts in every round and level, or a cache of prefixes would know them.
            fresh = dataclasses.replace(
                workload, requests=count, seed=workload.seed + 1000 * number
            )
            for server in servers:
                readings[server.name].append(run(server, fresh, concurrency))
        for name, found in readings.items():
            best = max(found, key=lambda level: level.new_tokens_per_second)
            levels[name].append(best)
            tell(f"{name}: {_words(best)}")
    return levels


def compare(levels: Levels) -> list[Comparison]:
    """The first server against each of the others."""
    first, *others = levels
    mine = {level.concurrency: level for level in levels[first]}
    comparisons = []
    for other in others:
        ratios = {
            level.concurrency: mine[level.concurrency].new_tokens_per_second
            / level.new_tokens_per_second
            for level in levels[other]
            if level.concurrency in mine
        }
        equal = []
        for level in levels[other]:
            latency = level.per_token[0]
            throughput = throughput_at(levels[first], latency)
            if throughput is not None:
                equal.append((latency, throughput / level.new_tokens_per_second))
        comparisons.append(Comparison(other, ratios, equal))
    return comparisons


def throughput_at(levels: Sequence[Level], latency: float) -> float | None:
    """New tokens per second where a token takes so long, between two levels; None outside them."""
    points = sorted((level.per_token[0], level.new_tokens_per_second) for level in levels)
    for (before, low), (behind, high) in itertools.pairwise(points):
        if before <= latency <= behind:
            part = 0.0 if behind == before else (latency - before) / (behind - before)
            return low + part * (high - low)
    return points[0][1] if len(points) == 1 and math.isclose(points[0][0], latency) else None


def lines(levels: Levels, comparisons: Sequence[Comparison]) -> list[str]:
    """The tables to print."""
    width = max(map(len, levels))
    table = [
        f"{'':<{width}}  at once  answered  new tokens/s  to first token (p95)  per token (p95)"
    ]
    for name, found in levels.items():
        for level in found:
            table.append(
                f"{name:<{width}}  {level.concurrency:>7}  "
                f"{level.answered:>4}/{level.answered + level.failed:<3}  "
                f"{level.new_tokens_per_second:>12,.1f}  "
                f"{_milliseconds(level.to_first):>20}  {_milliseconds(level.per_token):>15}"
            )
    first = next(iter(levels))
    for comparison in comparisons:
        table += ["", f"{first} against {comparison.other}, throughput"]
        for concurrency, ratio in comparison.by_concurrency.items():
            table.append(f"  {concurrency} at once: {ratio:.2f}x")
        for latency, ratio in comparison.at_equal_latency:
            table.append(f"  at {1000 * latency:.1f} ms per token: {ratio:.2f}x")
    return table


def as_json(
    workload: Workload, levels: Levels, comparisons: Sequence[Comparison]
) -> dict[str, Any]:
    """Everything measured, as plain values."""
    return {
        "workload": {
            name: value
            for name, value in dataclasses.asdict(workload).items()
            if name != "requests"  # each level has its own
        },
        "levels": {
            name: [
                {
                    **dataclasses.asdict(level),
                    "new_tokens_per_second": level.new_tokens_per_second,
                }
                for level in found
            ]
            for name, found in levels.items()
        },
        "comparisons": [
            {
                "first": next(iter(levels)),
                "other": comparison.other,
                "by_concurrency": {str(n): r for n, r in comparison.by_concurrency.items()},
                "at_equal_latency": [list(pair) for pair in comparison.at_equal_latency],
            }
            for comparison in comparisons
        ],
    }


def draw(levels: Levels, workload: Workload) -> Figure:
    """Throughput against concurrency, and against the time per token.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    speeds = {
        name: [level.new_tokens_per_second for level in found] for name, found in levels.items()
    }
    left = [
        Curve(name, [level.concurrency for level in found], speeds[name])
        for name, found in levels.items()
    ]
    right = [
        Curve(name, [1000 * level.per_token[0] for level in found], speeds[name])
        for name, found in levels.items()
    ]
    title = "New tokens per second"
    panels = [
        Panel(title, "requests at once", left, y_from_zero=True, x_in_powers_of_two=True),
        Panel(title, "milliseconds per token, median", right, y_from_zero=True),
    ]
    caption = f"{workload.prompt_tokens:,} prompt tokens and {workload.new_tokens:,} new ones each"
    return draw_panels(panels, caption)


def _words(level: Level) -> str:
    lost = f", {level.failed} lost" if level.failed else ""
    return (
        f"{level.concurrency} at once, {level.new_tokens_per_second:,.1f} new tokens/s, "
        f"first after {1000 * level.to_first[0]:.0f} ms, "
        f"then one in {1000 * level.per_token[0]:.1f} ms{lost}"
    )


def _milliseconds(pair: tuple[float, float]) -> str:
    return f"{1000 * pair[0]:.1f} ms ({1000 * pair[1]:.1f})"
