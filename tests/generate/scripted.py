"""A stand-in for a model that says what it is told."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sambay.generate import Engine
from sambay.layers.slots import SlotLayer, SlotStep
from sambay.model import ModelCache
from tests.tiny import VOCAB, tiny_config


class ScriptedModel:
    """Says the tokens of a script after any prompt, then the last of them for ever.

    All rows of a batch must have prompts of one length, given with the script.
    """

    def __init__(self, script: list[int], prompt_length: int, vocab_size: int = VOCAB) -> None:
        self.config = tiny_config("transformer++", vocab_size=vocab_size)
        self.head_weight = torch.zeros(vocab_size, 1)
        self.blocks = [SimpleNamespace(mixer=None)] * self.config.num_layers
        self.script = script
        self.prompt_length = prompt_length
        self.calls: list[tuple[int, str]] = []

    def parameters(self) -> tuple[torch.Tensor, ...]:
        """It has none that could change."""
        return ()

    def hidden_states(self, input_ids: Tensor, *, cache: ModelCache, outputs: str) -> Tensor:
        self.calls.append((input_ids.shape[1], outputs))
        cache.length += input_ids.shape[1]
        said = self._said(cache.length)
        return torch.full((input_ids.shape[0], 1 if outputs == "last" else 0, 1), said)

    def decode(self, tokens_B: Tensor, step: SlotStep, layers: Sequence[SlotLayer]) -> Tensor:
        self.calls.append((1, "decode"))
        said_B = [self._said(length) for length in step.lengths_B.tolist()]
        return self.logits(torch.tensor(said_B)[:, None])

    def _said(self, columns: int) -> int:
        step = min(columns - self.prompt_length, len(self.script) - 1)
        return self.script[step] if step >= 0 else 0

    def logits(self, h_BTD: Tensor) -> Tensor:
        return F.one_hot(h_BTD[..., 0], self.config.vocab_size) * 30.0

    def engine(self, **settings: Any) -> Engine:
        return Engine(cast(Any, self), **settings)
