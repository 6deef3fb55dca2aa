"""Prompts into a cache, and the logits behind them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sambay.model import LanguageModel, ModelCache


def distinct(prompts: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """The different prompts in order of appearance, and for every prompt which of them it is."""
    places: dict[bytes, int] = {}
    source = [places.setdefault(prompt.numpy().tobytes(), len(places)) for prompt in prompts]
    return [prompts[source.index(place)] for place in range(len(places))], source


def padding(prompts: Sequence[Tensor], device: torch.device) -> Tensor | None:
    """The columns of left padding of each row, (B,) int64; None if no row has any."""
    longest = max(len(prompt_T) for prompt_T in prompts)
    starts = [longest - len(prompt_T) for prompt_T in prompts]
    return torch.tensor(starts, device=device) if any(starts) else None


@torch.inference_mode()
def prefill(
    model: LanguageModel, prompts: Sequence[Tensor], cache: ModelCache, tokens_per_call: int
) -> Tensor:
    """The logits after the prompts, (B, V), which are then in `cache`.

    The prompts end together, so that shorter ones are padded on the left, as the cache was told
    when it was allocated. Behind the last layer with state only the last column is computed.
    """
    longest = max(len(prompt_T) for prompt_T in prompts)
    padded_BT = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row_T, prompt_T in zip(padded_BT, prompts, strict=True):
        row_T[longest - len(prompt_T) :] = prompt_T
    padded_BT = padded_BT.to(model.head_weight.device)
    width = max(1, tokens_per_call // len(prompts))
    h_BTD = None
    for begin in range(0, longest, width):
        chunk_BT = padded_BT[:, begin : begin + width]
        outputs = "last" if begin + width >= longest else "none"
        h_BTD = model.hidden_states(chunk_BT, cache=cache, outputs=outputs)
    assert h_BTD is not None, "a prompt has at least one token"
    return model.logits(h_BTD)[:, -1]
