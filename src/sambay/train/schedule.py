"""The learning rate as a pure function of the tokens seen."""

from __future__ import annotations

import math

from sambay.train.config import RunConfig, ScheduleConfig, ScheduleKind


def learning_rate_factor(schedule: ScheduleConfig, tokens: float) -> float:
    """The fraction of the peak learning rate at `tokens` seen, from 0 to 1.

    Linear warm-up from 0, then down to `minimum_factor` at `total_tokens` (arXiv 2507.06607,
    section 3.1: t / warmup, then (total - t) / (total - warmup)). "wsd" stays at the peak and
    falls linearly over the last `decay_fraction` of what follows the warm-up.
    """
    if tokens < schedule.warmup_tokens:
        return tokens / schedule.warmup_tokens
    if schedule.kind is ScheduleKind.CONSTANT:
        return 1.0
    after_warmup = schedule.total_tokens - schedule.warmup_tokens
    left = min(max((schedule.total_tokens - tokens) / max(after_warmup, 1), 0.0), 1.0)
    if schedule.kind is ScheduleKind.COSINE:
        falling = 0.5 * (1.0 - math.cos(math.pi * left))
    elif schedule.kind is ScheduleKind.WSD:
        falling = min(left / schedule.decay_fraction, 1.0) if schedule.decay_fraction else 1.0
    else:
        assert schedule.kind is ScheduleKind.LINEAR
        falling = left
    return schedule.minimum_factor + (1.0 - schedule.minimum_factor) * falling


def learning_rate(config: RunConfig, step: int) -> float:
    """The peak-scaled learning rate of step `step` (counted from 0).

    It is read off at the middle of the step's tokens: at the start the first step would have rate
    0 and at the end the last one would, each a step of work thrown away.
    """
    tokens = (step + 0.5) * config.tokens_per_step
    return config.optimizer.peak_learning_rate * learning_rate_factor(config.schedule, tokens)
