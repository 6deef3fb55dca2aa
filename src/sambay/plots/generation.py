"""Throughput against latency, and latency against length: plain numbers in, a picture out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sambay.plots.curves import Curve, Panel, draw_panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_generation(models: Mapping[str, Any], title: str, caption: str) -> Figure:
    """Two charts of one pair of lengths: a point per concurrency, and a point per length.

    models: of each name its `points`, with `latency` and `tokens_per_second`, and its
        `seconds_to_tokens` by number of tokens.
    """
    loads = Panel(
        f"Generated tokens per second, {title}",
        "seconds per request, from few clients to many",
        [
            Curve(
                name,
                [point["latency"] for point in found["points"]],
                [point["tokens_per_second"] for point in found["points"]],
            )
            for name, found in models.items()
        ],
        y_from_zero=True,
    )
    lengths = Panel(
        "Seconds to so many tokens, mean over loads",
        "generated tokens",
        [
            Curve(
                name,
                [float(mark) for mark in found["seconds_to_tokens"]],
                list(found["seconds_to_tokens"].values()),
            )
            for name, found in models.items()
        ],
        y_from_zero=True,
    )
    return draw_panels([loads, lengths], caption)
