"""How fast a run is, what share of the hardware it uses, and how much memory it takes."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch

from sambay.spec.footprint import training_flops
from sambay.train.config import Precision, RunConfig
from sambay.train.distributed import World

# Dense bfloat16 matrix products with float32 sums, per second, from the makers' data sheets.
# The first that is found in the name of a device counts.
BF16_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "MI300X": 1307e12,
}
_STATUS = Path("/proc/self/status")


class Gauges:
    """Reads what a run uses; all its processes ask at the same steps.

    peak_flops: of all devices together; None where nobody stated it.
    flops_per_token: of forward and backward, see `sambay.spec.footprint.training_flops`.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        self._world = world
        self._tokens = config.tokens_per_step
        length = config.data.sequence_length
        # Which pairs are visible between separate documents depends on the documents.
        attention = not config.data.separate_documents
        self.flops_per_token = training_flops(config.model, length, attention=attention) / length
        peak = peak_flops(config, device_name(world.device))
        self.peak_flops = None if peak is None else peak * world.size

    def metrics(self, seconds: float) -> dict[str, float]:
        """Tokens per second, MFU and memory after a step of `seconds`.

        Memory is in bytes, that of the process that uses most.
        """
        rate = self._tokens / seconds
        values = {"tokens_per_second": rate}
        if self.peak_flops is not None:
            values["mfu"] = rate * self.flops_per_token / self.peak_flops
        for name, amount in memory_bytes(self._world.device).items():
            values[f"memory/{name}"] = self._world.max(amount)
        return values


def peak_flops(config: RunConfig, device: str) -> float | None:
    """What one device can do per second: as configured, or as known for bf16; None: not known."""
    if config.logging.peak_flops is not None:
        return config.logging.peak_flops
    if config.precision is not Precision.BF16 or re.search(r"\bMIG\b", device):
        return None  # a part of a GPU has an unknown part of its speed
    known = (peak for name, peak in BF16_PEAKS.items() if re.search(rf"\b{name}\b", device))
    return next(known, None)


def device_name(device: torch.device) -> str:
    """What the maker calls a CUDA device; the type of any other."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def memory_bytes(device: torch.device) -> dict[str, int]:
    """What this process has in memory, and the most it had: of the host, and of a CUDA device.

    "host" is left out where the system tells only the maximum.
    """
    amounts: dict[str, int] = {}
    if _STATUS.exists():
        fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        amounts["host"] = int(fields["VmRSS"].split()[0]) * 1024
        amounts["host_peak"] = int(fields["VmHWM"].split()[0]) * 1024
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        amounts["host_peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.type == "cuda":
        amounts["device"] = torch.cuda.memory_allocated(device)
        amounts["device_peak"] = torch.cuda.max_memory_allocated(device)
    return amounts
