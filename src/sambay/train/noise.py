"""Random numbers of a forward pass that depend on its place in the run and on nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def reproducible_noise(device: torch.device, *place: int) -> Iterator[None]:
    """A context in which torch's global generators are seeded by `place`, and restored after it.

    `place` is, say, (seed, step, rank, micro-batch): nothing has to be saved for a run to continue
    with the same numbers, and what else draws from the generators changes nothing. Attention
    kernels draw their dropout from the global generator. Activation checkpointing keeps the
    generator's state with each block and so recomputes with the same numbers.
    """
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little") >> 1  # generators take 63 bits without a sign
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
