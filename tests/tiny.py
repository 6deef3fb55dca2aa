"""Small, odd models of every family member: sizes that do not divide each other hide nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sambay.model import LanguageModel, ModelCache, initialise
from sambay.spec import ModelConfig, RecurrentKind, presets

VOCAB = 61
# Two recurrences in other arrangements, and with the norm in other places: layers have tests of
# their own, so models of these are built only by tests that are asked for, and by cheap ones.
_REARRANGED = ("mambay-2", "gdny", "sambay-2+nb", "mambay-2+nb", "s-gdny+gdn", "gdny+gdn")
NAMES = tuple(name for name in presets.NAMES if name not in _REARRANGED)
FAMILY = [*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in _REARRANGED)]


def tiny_config(name: str, **fields: Any) -> ModelConfig:
    """Depth 8, hidden 36, 4 key heads of 6, 8 query heads, window 5; 3 recurrent heads of 5."""
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 36,
        "intermediate_size": 52,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 6,
        "d_state": 3,
    }
    if "window" in presets.PRESETS[name].fields:
        shape["window"] = 5
    preset_kind = presets.PRESETS[name].fields.get("recurrent_kind", RecurrentKind.MAMBA)
    if fields.get("recurrent_kind", preset_kind) != RecurrentKind.MAMBA:
        shape |= {"recurrent_heads": 3, "recurrent_head_dim": 5}
    return presets.build(name, 8, **(shape | fields))


def tiny_model(name: str, *, dtype: torch.dtype = torch.float64, **fields: Any) -> LanguageModel:
    """A tiny model whose every parameter is random, so that nothing hides behind a zero."""
    model = LanguageModel(tiny_config(name, **fields))
    initialise(model, "mup_published", seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                noise = torch.empty(parameter.shape).uniform_(-0.2, 0.2, generator=generator)
                parameter.add_(noise)
    return model.to(dtype).eval()


def allocate(
    model: LanguageModel, batch: int, capacity: int, starts: torch.Tensor | None = None
) -> ModelCache:
    """A cache in the dtype of the model's weights; recurrent states too if that is float64."""
    dtype = model.head_weight.dtype
    cache = ModelCache.allocate(model.config, batch, capacity, dtype, "cpu", starts)
    if dtype is torch.float64:
        for state in cache.layers:
            if state is not None:
                state.buffers = {name: x.double() for name, x in state.buffers.items()}
    return cache


def random_ids(batch: int, columns: int, seed: int = 0) -> torch.Tensor:
    """(batch, columns) token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (batch, columns), generator=generator)
