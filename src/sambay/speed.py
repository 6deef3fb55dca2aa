"""How fast models train, prefill and decode on this machine: plain readings, nothing extrapolated.

Readings of several models alternate, so that a machine that slows down slows all of them, and the
fastest of several readings is kept: what disturbs a reading only ever makes it slower.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sambay.model import LanguageModel, ModelCache

PREFILL_CHUNK = 2048  # tokens per prefill call, as when generating


@dataclasses.dataclass(frozen=True)
class GenerationSpeed:
    """Seconds for a prompt of `context` tokens and for one token behind it, all rows together.

    `cache_bytes` is what the cache of the filled context occupies.
    """

    context: int
    batch_size: int
    prefill_seconds: float
    step_seconds: float
    cache_bytes: int

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens of all rows per second."""
        return self.context * self.batch_size / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens of all rows per second."""
        return self.batch_size / self.step_seconds


def compare_generation(
    models: Mapping[str, LanguageModel],
    contexts: Sequence[int],
    *,
    batch_size: int = 1,
    steps: int = 32,
    repeats: int = 3,
) -> Iterator[tuple[str, GenerationSpeed]]:
    """The speed of every model at every context length, in order of length."""
    for model in models.values():
        _read_generation(model, 64, batch_size, 2)  # builds kernels, warms caches
    for context in contexts:
        readings: dict[str, list[GenerationSpeed]] = {name: [] for name in models}
        for _ in range(repeats):
            for name, model in models.items():
                readings[name].append(_read_generation(model, context, batch_size, steps))
        for name, found in readings.items():
            yield name, _fastest(found)


@torch.inference_mode()
def _read_generation(
    model: LanguageModel, context: int, batch_size: int, steps: int
) -> GenerationSpeed:
    weight = model.head_weight
    ids_BT = _random_ids(model, batch_size, context)
    cache_bytes = ModelCache.allocate(
        model.config, batch_size, context, weight.dtype, weight.device
    ).nbytes
    cache = ModelCache.allocate(
        model.config, batch_size, context + steps + 1, weight.dtype, weight.device
    )
    started = _now(weight)
    for begin in range(0, context, PREFILL_CHUNK):
        chunk_BT = ids_BT[:, begin : begin + PREFILL_CHUNK]
        is_last = begin + PREFILL_CHUNK >= context
        h_BTD = model.hidden_states(chunk_BT, cache=cache, outputs="last" if is_last else "none")
    token_B1 = model.logits(h_BTD).argmax(-1)
    prefilled = _now(weight)
    model(token_B1, cache=cache, outputs="last")  # the first step allocates what later ones reuse
    seconds = []
    for _ in range(steps):
        before = _now(weight)
        token_B1 = model(token_B1, cache=cache, outputs="last").argmax(-1)
        seconds.append(_now(weight) - before)
    return GenerationSpeed(
        context, batch_size, prefilled - started, sorted(seconds)[steps // 2], cache_bytes
    )


def fastest_seconds(
    steps: Mapping[str, Callable[[], object]], *, repeats: int = 3
) -> dict[str, float]:
    """Seconds of the fastest of `repeats` calls of each step, after one call to warm up."""
    best = dict.fromkeys(steps, float("inf"))
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if repeat > 0:
                best[name] = min(best[name], time.perf_counter() - started)
    return best


def _fastest(readings: Sequence[GenerationSpeed]) -> GenerationSpeed:
    return dataclasses.replace(
        readings[0],
        prefill_seconds=min(reading.prefill_seconds for reading in readings),
        step_seconds=min(reading.step_seconds for reading in readings),
    )


def _random_ids(model: LanguageModel, batch_size: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    shape = (batch_size, length)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator)
    return ids.to(model.head_weight.device)


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()
