"""What is asked of the engine and what it answers: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sambay.errors import ConfigError
from sambay.generate.sampling import GREEDY, SamplingParams

FinishReason = Literal["stop", "length"]


def never(token: int) -> bool:
    """The `stop_when` of a request that no outside observer may end."""
    return False


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    prompt: token ids, at least one; a list, an integer array or a tensor.
    max_new_tokens: most tokens to produce; None goes on until something stops it or memory ends.
    stop_token_ids: producing one of these ends the continuation (it is part of the answer).
    stop_when: called once with every token produced, in order; True ends the continuation. This is
        where stop strings attach; it may keep state, so give each request its own.
    """

    prompt: Sequence[int] | np.ndarray | Tensor
    max_new_tokens: int | None
    sampling: SamplingParams = GREEDY
    stop_token_ids: Collection[int] = frozenset()
    stop_when: Callable[[int], bool] = never


@dataclass(frozen=True)
class TokenEvent:
    """A token just produced for request number `request`.

    logprob: the model's own log-probability of it, before penalty, temperature and truncation.
    finish_reason: set on the last token of a request.
    """

    request: int
    token: int
    logprob: float
    finish_reason: FinishReason | None


@dataclass
class Completion:
    """The continuation of one prompt.

    tokens: everything produced, including a stop token that ended it.
    logprobs: one per token, as in `TokenEvent`.
    finish_reason: "stop" (stop token or `stop_when`) or "length" (`max_new_tokens`, or memory ended
        a request without that limit).
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None


def checked_prompt(request: Request, number: int, vocab_size: int) -> Tensor:
    """The prompt of a request as an int64 tensor on the CPU.

    Raises:
        ConfigError: an empty prompt, a token outside the vocabulary, no token to produce.
    """
    if len(request.prompt) == 0:
        raise ConfigError(f"prompt {number} is empty; give at least one token")
    limit = request.max_new_tokens
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ConfigError(f"max_new_tokens is {limit!r}; it must be an integer of at least 1")
    try:
        if isinstance(request.prompt, Tensor):
            prompt_T = request.prompt.detach().cpu()
        else:
            prompt_T = torch.tensor(request.prompt)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _not_token_ids(number) from error
    if prompt_T.is_floating_point() or prompt_T.dtype == torch.bool or prompt_T.ndim != 1:
        raise _not_token_ids(number)
    prompt_T = prompt_T.to(torch.int64)
    outside = (prompt_T < 0) | (prompt_T >= vocab_size)
    if bool(outside.any()):
        raise ConfigError(
            f"prompt {number} holds token id {int(prompt_T[outside][0])}, outside the model's "
            f"vocabulary of {vocab_size}; use the tokenizer that belongs to the model"
        )
    return prompt_T


def _not_token_ids(number: int) -> ConfigError:
    return ConfigError(f"prompt {number} is not a list of token ids; encode the text first")


def plan_batches(
    lengths: Sequence[int],
    new_columns: Sequence[int],
    max_batch_size: int,
    fits: Callable[[int, int], bool],
) -> list[list[int]]:
    """Requests grouped into batches of similar length, the longest prompts first.

    lengths, new_columns: columns of each prompt and, beyond it, of its longest continuation.
    fits(batch_size, columns): whether so large a batch may be made. A single request always is
        one, fitting or not: the batch itself says what is wrong with it.

    The first batch is the one that needs most memory per row, so trouble shows at the start.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], -new_columns[i], i))
    batches: list[list[int]] = []
    longest = most_new = 0
    for index in order:
        columns = max(longest, lengths[index]) + max(most_new, new_columns[index])
        batch = batches[-1] if batches else []
        if not batch or len(batch) >= max_batch_size or not fits(len(batch) + 1, columns):
            batches.append([])
            longest = most_new = 0
        batches[-1].append(index)
        longest, most_new = max(longest, lengths[index]), max(most_new, new_columns[index])
    return batches
