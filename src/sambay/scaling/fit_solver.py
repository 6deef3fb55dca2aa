"""Many power-law fits at once: L = A D^-b + C for every row of a table of losses (numpy only).

For a fixed exponent the other two constants follow from linear least squares, so each fit is a
search over one number: a grid over b, which all rows share, then a golden-section search in the
best cell of each row. The bootstrap, the profile intervals and the coverage tests need thousands of
fits and rest on this; `sambay.scaling.fit` does a single one with scipy, the slow twin.

Letters: F fits (rows), N observations, G exponents on the grid.
"""

from __future__ import annotations

import dataclasses
import enum

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SMALLEST_EXPONENT, LARGEST_EXPONENT = 1e-6, 2.0
# Below 0.003 C is always at its lower bound (unless x spans hundreds of nats), so few points do.
_GRID = np.array([SMALLEST_EXPONENT, 1e-4, 1e-3, *np.geomspace(3e-3, LARGEST_EXPONENT, 42)])
_GOLDEN = (np.sqrt(5.0) - 1) / 2
_SEARCH_STEPS = 26  # 0.618^26 of a cell: b to six digits, far finer than any interval


class Quantity(enum.Enum):
    """What an interval is for."""

    A = "A"
    B = "b"
    C = "C"
    LOSS = "loss"  # the predicted loss at a given D


@dataclasses.dataclass(frozen=True)
class Fits:
    """Constants and residual sums of squares of F fits, each of shape (F,), float64."""

    A: Array
    b: Array
    C: Array
    rss: Array

    def predict(self, x: Array) -> Array:
        """Losses (F, M) at the points x (M,)."""
        return self.A[:, None] * np.exp(-self.b[:, None] * np.log(x)) + self.C[:, None]


@dataclasses.dataclass(frozen=True)
class Fixed:
    """One quantity held at a value per row (F,); `x` is the D of `Quantity.LOSS`."""

    quantity: Quantity
    values: Array
    x: float = 1.0


def fit_rows(x: Array, losses_FN: Array, fixed: Fixed | None = None) -> Fits:
    """The least-squares fits of all rows: A >= 0, 1e-6 <= b <= 2, 0 <= C <= the row's least loss.

    Args:
        x: (N,) the positive D of the observations, the same for all rows.
        losses_FN: (F, N).
        fixed: a quantity that may not move, for profiles; the others are fitted around it.
    """
    log_x = np.log(x)
    centre = float(log_x.mean())  # with D in units of its geometric mean the basis stays near one
    log_x = log_x - centre
    if fixed is not None and fixed.quantity is Quantity.B:
        b = np.clip(fixed.values, SMALLEST_EXPONENT, LARGEST_EXPONENT)
    else:
        b = _search(log_x, centre, losses_FN, fixed)
    scale, C, rss = _given_exponent(log_x, centre, losses_FN, b, fixed)
    return Fits(scale * np.exp(b * centre), b, C, rss)


def _search(log_x: Array, centre: float, losses_FN: Array, fixed: Fixed | None) -> Array:
    """The best exponent of each row, (F,)."""
    rss_FG = np.stack(
        [
            _given_exponent(log_x, centre, losses_FN, np.full(1, exponent), fixed)[2]
            for exponent in _GRID
        ],
        axis=1,
    )
    best = rss_FG.argmin(axis=1)
    low = np.log(_GRID[np.maximum(best - 1, 0)])
    high = np.log(_GRID[np.minimum(best + 1, len(_GRID) - 1)])

    def rss(log_b: Array) -> Array:
        return _given_exponent(log_x, centre, losses_FN, np.exp(log_b), fixed)[2]

    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    rss_left, rss_right = rss(left), rss(right)
    for _ in range(_SEARCH_STEPS):
        go_left = rss_left < rss_right
        low, high = np.where(go_left, low, left), np.where(go_left, right, high)
        probe = np.where(go_left, high - _GOLDEN * (high - low), low + _GOLDEN * (high - low))
        rss_probe = rss(probe)
        left, right = np.where(go_left, probe, right), np.where(go_left, left, probe)
        rss_left, rss_right = (
            np.where(go_left, rss_probe, rss_right),
            np.where(go_left, rss_left, rss_probe),
        )
    return np.exp((low + high) / 2)


def _given_exponent(
    log_x: Array, centre: float, losses_FN: Array, b: Array, fixed: Fixed | None
) -> tuple[Array, Array, Array]:
    """Scale, C and residual sum (F,) for exponents b (F,) or (1,); A = scale exp(b centre)."""
    drop = np.expm1(-b[:, None] * log_x)  # exp(-b log x) - 1 keeps its digits where b is tiny
    basis = 1 + drop
    least = losses_FN.min(axis=1)
    quantity = None if fixed is None else fixed.quantity
    if fixed is not None and quantity is Quantity.A:
        scale = fixed.values * np.exp(-b * centre)
        C = np.clip((losses_FN - scale[:, None] * basis).mean(axis=1), 0.0, least)
    elif fixed is not None and quantity is Quantity.LOSS:
        # Through the given point: L - value = scale (basis - basis at x), and C in its bounds.
        at_x = np.exp(-b * (np.log(fixed.x) - centre))
        shape = basis - at_x[:, None]
        above = losses_FN - fixed.values[:, None]
        scale = (shape * above).sum(axis=1) / (shape * shape).sum(axis=1)
        scale = np.clip(scale, np.maximum(fixed.values - least, 0.0) / at_x, fixed.values / at_x)
        C = fixed.values - scale * at_x
    else:
        if fixed is not None and quantity is Quantity.C:
            C = np.broadcast_to(fixed.values, least.shape)
        else:
            centred = drop - drop.mean(axis=1, keepdims=True)
            slope = (centred * losses_FN).sum(axis=1) / (centred * centred).sum(axis=1)
            C = np.clip(losses_FN.mean(axis=1) - slope * basis.mean(axis=1), 0.0, least)
        above = losses_FN - C[:, None]
        scale = (basis * above).sum(axis=1) / (basis * basis).sum(axis=1)
        scale = np.maximum(scale, 0.0)
    residuals = losses_FN - scale[:, None] * basis - C[:, None]
    return scale, C, (residuals * residuals).sum(axis=1)
