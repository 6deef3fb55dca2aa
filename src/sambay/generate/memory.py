"""How much memory a batch needs and how much there is, asked before any work starts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from sambay.errors import SambayError
from sambay.spec.footprint import cache_bytes
from sambay.spec.model_config import ModelConfig
from sambay.spec.recurrent import conv_channels

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


class NotEnoughMemory(SambayError):
    """A batch whose cache and activations would not fit into the memory that is available."""


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on `device`; None where the system does not say.

    On the CPU the lower of what the kernel calls available and what the control group (container)
    leaves; on CUDA what the driver has free plus what torch holds in reserve.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        return free + reserved - used
    if device.type != "cpu":
        return None
    known = [amount for amount in (_system_bytes(), _group_bytes()) if amount is not None]
    return min(known, default=None)


def working_bytes(config: ModelConfig, batch_size: int, call_tokens: int, value_bytes: int) -> int:
    """An estimate of the activations of one forward call of `call_tokens` tokens, with its logits.

    Counts the tensors alive at once in the widest layer; the scan and the sampling work in wider
    types than the model. Meant to be right within a factor of two.
    """
    recurrent = 8 * max(config.d_inner, conv_channels(config))
    widths = 4 * config.hidden_size + 3 * config.intermediate_size + recurrent
    return call_tokens * widths * max(value_bytes, 4) + batch_size * config.vocab_size * 8 * 6


def batch_bytes(
    config: ModelConfig, batch_size: int, columns: int, *, chunk: int, value_bytes: int
) -> int:
    """What a batch of `columns` columns needs: exact cache plus estimated activations."""
    call_tokens = min(batch_size * columns, max(chunk, batch_size))
    cache = cache_bytes(config, batch_size, columns, kv_bytes=value_bytes)
    return cache + working_bytes(config, batch_size, call_tokens, value_bytes)


def require_memory(
    config: ModelConfig,
    batch_size: int,
    columns: int,
    *,
    chunk: int,
    value_bytes: int,
    device: torch.device,
) -> None:
    """Refuse a batch that cannot fit.

    Raises:
        NotEnoughMemory: says what is needed, what there is, and what would fit.
    """
    available = available_bytes(device)
    needed = batch_bytes(config, batch_size, columns, chunk=chunk, value_bytes=value_bytes)
    if available is None or needed <= available:
        return
    single = batch_bytes(config, 1, columns, chunk=chunk, value_bytes=value_bytes)
    if single <= available:
        remedy = f"generate about {max(1, available * batch_size // needed)} prompts at a time"
    else:
        remedy = "shorten the prompt, lower max_new_tokens, or use a machine with more memory"
    raise NotEnoughMemory(
        f"{batch_size} x {columns} tokens (prompt and continuation) need {readable_bytes(needed)} "
        f"of memory on {device}, {readable_bytes(available)} are available; {remedy}"
    )


def captured_bytes(config: ModelConfig, num_slots: int) -> int:
    """An estimate, somewhat too high, of what captured steps keep: the output of every operation.

    What one layer computed lies beside what the next does, in float32 at most.
    """
    widths = 5 * config.hidden_size + 3 * config.intermediate_size
    widths += 3 * (config.d_inner + config.attention_size)
    return 4 * num_slots * (config.num_layers * widths + 2 * config.vocab_size)


def slots_bytes(
    config: ModelConfig, num_slots: int, capacity: int, *, chunk: int, value_bytes: int
) -> int:
    """What slots of `capacity` columns need: exact caches plus estimated activations.

    Besides the slots themselves there are up to two caches of prompts of `chunk` tokens together:
    those just computed for several slots, and a prompt kept for slots to come; and what captured
    steps keep.
    """
    passing = min(capacity, -(-chunk // num_slots))
    cache = cache_bytes(config, num_slots, capacity, kv_bytes=value_bytes)
    prompts = 2 * cache_bytes(config, num_slots, passing, kv_bytes=value_bytes)
    call_tokens = min(num_slots * capacity, max(chunk, num_slots))
    working = working_bytes(config, num_slots, call_tokens, value_bytes)
    return cache + prompts + captured_bytes(config, num_slots) + working


def require_slots(
    config: ModelConfig,
    num_slots: int,
    capacity: int,
    *,
    chunk: int,
    value_bytes: int,
    available: int | None,
    device: torch.device,
) -> None:
    """Refuse slots that cannot fit into the bytes available, naming what would.

    Raises:
        NotEnoughMemory: says what is needed, what there is, and the most slots of this capacity
            and the largest capacity of so many slots that fit.
    """

    def need(slots: int, columns: int) -> int:
        return slots_bytes(config, slots, columns, chunk=chunk, value_bytes=value_bytes)

    if available is None or need(num_slots, capacity) <= available:
        return
    most_slots = _largest(lambda count: need(count, capacity) <= available, num_slots)
    most_columns = _largest(lambda count: need(num_slots, count) <= available, capacity)
    alone = _largest(lambda count: need(1, count) <= available, capacity)
    fitting = [(most_slots, capacity), (num_slots, most_columns), (1, alone)]
    # Without repetition, and without what holds no text at all.
    words = dict.fromkeys(
        f"{slots} slot{'s' * (slots != 1)} of {columns} columns"
        for slots, columns in fitting[: 2 if most_slots or most_columns else 3]
        if slots and columns
    )
    remedy = f"{' or '.join(words)} would fit" if words else "use a machine with more memory"
    raise NotEnoughMemory(
        f"{num_slots} slots x {capacity} columns (prompt and continuation) need "
        f"{readable_bytes(need(num_slots, capacity))} of memory on {device}, "
        f"{readable_bytes(available)} are available; {remedy}"
    )


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest count from 1 to `most` that fits, 0 if none does; fewer always fit too."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def readable_bytes(count: int) -> str:
    """A number of bytes in the largest fitting binary unit: 1.5 GiB."""
    amount, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def _system_bytes() -> int | None:
    """Available memory of the machine: the kernel's own estimate, else all physical pages."""
    if MEMINFO.exists():
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _group_bytes() -> int | None:
    """What the control group leaves, counting file pages it could drop; None without a limit."""
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if not (limit.exists() and used.exists()):
        return None
    text = limit.read_text().strip()
    if not text.isdigit():
        return None
    droppable = 0
    statistics = CGROUP / "memory.stat"
    if statistics.exists():
        for line in statistics.read_text().splitlines():
            if line.startswith("inactive_file "):
                droppable = int(line.split()[1])
    return max(0, int(text) - int(used.read_text()) + droppable)
