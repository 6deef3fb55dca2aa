"""The 1B models on rows of 32K tokens (arXiv 2507.06607, section 3.2, tables 1, 2, 5 and 8)."""

from __future__ import annotations

from dataclasses import replace

from sambay.recipes.published import LENGTH, ROWS, scaling_run
from sambay.spec import Position
from sambay.train.config import BatchConfig, CheckpointConfig, DataConfig, RunConfig

_LENGTH = 32_768
_ROPE_THETA = 640_000.0  # the base for 4K tells positions apart too fast here
# The best of 64 to 2048 for each; the other architectures were published with their preset's.
_WINDOWS = {
    "transformer-ls": 256,
    "swa+yoco": 128,
    "samba+yoco": 1024,
    "sambay": 256,
    "sambay+da": 512,
}


def prolong_32k(architecture: str = "sambay") -> RunConfig:
    """Long context: depth 16, 40 B tokens of ProLong-64K in 32K rows, documents kept apart."""
    base = scaling_run(architecture, 16, 40_000_000_000)
    model = base.model
    if architecture in _WINDOWS:
        model = model.replace(window=_WINDOWS[architecture])
    if model.position is Position.ROPE:
        model = model.replace(rope_theta=_ROPE_THETA)
    return replace(
        base,
        model=model,
        data=DataConfig("data/prolong", sequence_length=_LENGTH, separate_documents=True),
        batch=BatchConfig(ROWS * LENGTH // _LENGTH, micro_batch_size=1),
        evaluation=replace(base.evaluation, lengths=(1,)),
        checkpoint=CheckpointConfig(every_steps=500),
    )
