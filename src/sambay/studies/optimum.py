"""Where the best learning rate of a sweep is, and whether it stays there as models grow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

ALLOWED_SHIFT = 1  # steps of the grid by which the best rate may move and still count as carried


@dataclass(frozen=True)
class Optimum:
    """The best rate of one model.

    factor: the best of the grid, at `index` of its ascending rates; loss: what it reached.
    vertex: the best by a parabola in the logarithm of the rate through it and its neighbours; None
        at the edge of the grid, or where a neighbour gave no loss.
    """

    factor: float
    index: int
    loss: float
    vertex: float | None
    at_edge: bool


def find_optimum(losses: Mapping[float, float | None]) -> Optimum | None:
    """The optimum of the loss by rate factor; None if no rate gave a finite loss.

    A rate without a loss (its run diverged, or is not done) is worse than all others.
    """
    factors = sorted(losses)
    values = [_finite(losses[factor]) for factor in factors]
    best = min(range(len(values)), key=values.__getitem__, default=None)
    if best is None or math.isinf(values[best]):
        return None
    at_edge = best in (0, len(factors) - 1)
    near = slice(best - 1, best + 2)
    vertex = None if at_edge else _vertex(factors[near], values[near])
    return Optimum(factors[best], best, values[best], vertex, at_edge)


def _vertex(factors: list[float], losses: list[float]) -> float | None:
    """The factor at the lowest point of a parabola through three points in log factor."""
    if not all(map(math.isfinite, losses)):
        return None
    x0, x1, x2 = map(math.log2, factors)
    left, right = (losses[1] - losses[0]) / (x1 - x0), (losses[2] - losses[1]) / (x2 - x1)
    curvature = (right - left) / (x2 - x0)
    if curvature <= 0:  # three equal losses
        return factors[1]
    return 2 ** ((x0 + x1) / 2 - left / (2 * curvature))


@dataclass(frozen=True)
class Shift:
    """How far the optimum of one parametrisation moves over the depths, in steps of the grid.

    by_grid: of the grid's best rates. by_parabola: of the vertices, None if one is missing.
    verdict: in words.
    """

    by_grid: int | None
    by_parabola: float | None
    verdict: str

    @property
    def is_carried_over(self) -> bool:
        """Whether the optimum stays within one step of the grid, away from its edges."""
        return self.verdict.startswith("carried over")


def find_shift(optima: Mapping[int, Optimum | None], factors: list[float]) -> Shift:
    """The shift between the optima by depth, on a grid of rate factors."""
    found = {depth: one for depth, one in optima.items() if one is not None}
    if len(found) < 2:
        return Shift(None, None, "undecided: fewer than two depths have a finite loss")
    indices = [one.index for one in found.values()]
    by_grid = max(indices) - min(indices)
    vertices = [math.log2(one.vertex) for one in found.values() if one.vertex is not None]
    step = math.log2(factors[-1] / factors[0]) / (len(factors) - 1)
    complete = len(vertices) == len(found)
    by_parabola = (max(vertices) - min(vertices)) / step if complete else None
    edges = [str(depth) for depth, one in found.items() if one.at_edge]
    if by_grid > ALLOWED_SHIFT:
        verdict = f"not carried over: the best rate moves by {by_grid} steps of the grid"
    elif edges:
        verdict = (
            f"undecided: at depth {', '.join(edges)} the best rate is at the edge of the grid; "
            "widen --factors"
        )
    else:
        moves = "does not move" if by_grid == 0 else "moves by one step of the grid"
        verdict = f"carried over: the best rate {moves}"
    return Shift(by_grid, by_parabola, verdict)


def _finite(loss: float | None) -> float:
    return loss if loss is not None and math.isfinite(loss) else math.inf
