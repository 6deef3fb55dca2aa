"""What becomes of a step whose loss or gradient cannot be used."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from sambay.errors import SambayError
from sambay.train.config import ResilienceConfig
from sambay.train.trainer import Learned

_ENOUGH = 10  # losses before their median says anything


class TrainingDiverged(SambayError):
    """Too many steps in a row could not be used; the last checkpoint is untouched."""


def is_usable(learned: Learned, recent: Sequence[float], config: ResilienceConfig) -> bool:
    """Whether weights may be updated by a step: finite, and its loss no spike above `recent`."""
    if not learned.is_finite:
        return False
    if config.spike_factor is None or len(recent) < min(_ENOUGH, config.spike_window):
        return True
    return learned.loss <= config.spike_factor * statistics.median(recent)


def remember(recent: tuple[float, ...], loss: float, config: ResilienceConfig) -> tuple[float, ...]:
    """The last losses after one more, as far as anything needs them."""
    return () if config.spike_factor is None else (*recent, loss)[-config.spike_window :]
