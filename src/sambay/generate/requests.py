"""What is asked of the engine and what it answers: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

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

    def extend(self, event: TokenEvent) -> None:
        """Take in the next token of this continuation."""
        self.tokens.append(event.token)
        self.logprobs.append(event.logprob)
        self.finish_reason = event.finish_reason


@dataclass
class Timings:
    """What an engine has done so far, in tokens and seconds, sampling included.

    prefill_tokens counts prompt tokens without padding, a prompt that several requests share once;
    decode_tokens counts tokens produced after the first of each request.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0


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


class Pool(NamedTuple):
    """Requests, by number, that share so many slots of so many columns."""

    num_slots: int
    capacity: int
    numbers: list[int]


def plan_pools(
    lengths: Sequence[int],
    new_columns: Sequence[int],
    max_slots: int,
    fits: Callable[[int, int], bool],
) -> list[Pool]:
    """Requests in pools of slots that are long enough for the longest of each.

    lengths, new_columns: columns of each prompt and of its continuation beyond it.
    fits(num_slots, capacity): whether so many slots may be made. One slot always may: the slot
        itself says what is wrong with it.

    Everything is one pool if that has as many slots as are wanted. Otherwise long requests would
    take the memory of short ones, and each pool has the requests of more than half its capacity.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], -new_columns[i], i))
    columns = [length + new for length, new in zip(lengths, new_columns, strict=True)]
    pools: list[Pool] = []
    while order:
        capacity, wanted = max(columns[i] for i in order), min(max_slots, len(order))
        chosen = order
        if not fits(wanted, capacity):
            chosen = [i for i in order if 2 * columns[i] > capacity]
            wanted = min(wanted, len(chosen))
        while wanted > 1 and not fits(wanted, capacity):
            wanted -= 1
        pools.append(Pool(wanted, capacity, chosen))
        taken = set(chosen)
        order = [i for i in order if i not in taken]
    return pools


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
