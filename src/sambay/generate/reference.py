"""Greedy generation without a cache: what the engine must equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sambay.model import LanguageModel


@torch.inference_mode()
def reference_generate(
    model: LanguageModel, prompt: Sequence[int], num_tokens: int
) -> tuple[list[int], Tensor]:
    """The greedy continuation of one prompt and the logits it came from, (num_tokens, V).

    Every token runs the whole sequence through every layer: no cache, no padding, no shortcut.
    """
    ids = list(prompt)
    steps = []
    for _ in range(num_tokens):
        input_ids_BT = torch.tensor([ids], device=model.head_weight.device)
        logits_V = model.logits(model.hidden_states(input_ids_BT))[0, -1]
        steps.append(logits_V)
        ids.append(int(logits_V.argmax()))
    return ids[len(prompt) :], torch.stack(steps)
