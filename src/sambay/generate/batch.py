"""The rows of one running batch: who is alive, what each has produced, how each draws."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sambay.errors import SambayError
from sambay.generate.requests import FinishReason, Request, TokenEvent
from sambay.generate.sampling import SamplingTable, choose_tokens, uniform_stream

DROP_BELOW = 0.75
"""Finished rows are dropped once no more than this share is alive: each drop copies the cache, and
with a fixed share all copies together cost a few times the first cache, however long it runs."""


@dataclass
class Row:
    """One request in the batch; `number` is its place in the caller's list."""

    number: int
    request: Request
    stream: random.Random
    produced: int = 0
    finished: bool = False


class RunningBatch:
    """Chooses the next token of every row and keeps account of who goes on.

    Rows that finish stay in place, fed with their last token and ignored, until `rows_to_keep`
    says that it pays to drop them.
    """

    def __init__(
        self,
        numbers: Sequence[int],
        requests: Sequence[Request],
        prompts: Sequence[Tensor],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.device = device
        self.rows = [
            Row(number, request, uniform_stream(request.sampling.seed))
            for number, request in zip(numbers, requests, strict=True)
        ]
        self.table = SamplingTable([row.request.sampling for row in self.rows], device)
        self.seen_BV: Tensor | None = None
        if self.table.penalises:
            self.seen_BV = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
            for seen_V, prompt_T in zip(self.seen_BV, prompts, strict=True):
                seen_V[prompt_T.to(device)] = True
        self.tokens_B = torch.zeros(len(prompts), dtype=torch.int64, device=device)

    @property
    def num_alive(self) -> int:
        return sum(not row.finished for row in self.rows)

    def choose(self, logits_BV: Tensor) -> list[float]:
        """Set `tokens_B` to the next token of each row; their log-probabilities.

        Raises:
            SambayError: logits that are not numbers, in a row that still counts.
        """
        uniforms = [
            0.0 if row.finished or row.request.sampling.greedy else row.stream.random()
            for row in self.rows
        ]
        logits_BV = logits_BV.to(torch.float32)
        self.tokens_B = choose_tokens(logits_BV, self.table, self.seen_BV, uniforms)
        chosen_B = logits_BV.gather(1, self.tokens_B[:, None])[:, 0]
        logprobs = (chosen_B - logits_BV.logsumexp(-1)).tolist()
        for row, logprob in zip(self.rows, logprobs, strict=True):
            if not row.finished and not math.isfinite(logprob):
                raise SambayError(
                    f"the model's output for prompt {row.number} is not a number after "
                    f"{row.produced} tokens; its weights are damaged or overflow in this dtype"
                )
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, self.tokens_B[:, None], True)
        return logprobs

    def record(self, logprobs: Sequence[float], has_room: bool) -> list[TokenEvent]:
        """Account for the tokens just chosen: one event per row alive, ended rows marked.

        Without room for another token every row ends.
        """
        events = []
        for row, token, logprob in zip(self.rows, self.tokens_B.tolist(), logprobs, strict=True):
            if row.finished:
                continue
            row.produced += 1
            reason = _finish_reason(row, token)
            if reason is None and not has_room:
                reason = "length"
            row.finished = reason is not None
            events.append(TokenEvent(row.number, token, logprob, reason))
        return events

    def rows_to_keep(self) -> Tensor | None:
        """Index of the rows alive if dropping the others pays now, else None."""
        alive = [place for place, row in enumerate(self.rows) if not row.finished]
        if len(alive) == len(self.rows) or len(alive) > DROP_BELOW * len(self.rows):
            return None
        return torch.tensor(alive, dtype=torch.int64, device=self.device)

    def select(self, index_B: Tensor) -> None:
        """Keep only these rows, in this order."""
        self.rows = [self.rows[place] for place in index_B.tolist()]
        self.table = SamplingTable([row.request.sampling for row in self.rows], self.device)
        self.tokens_B = self.tokens_B[index_B]
        if self.seen_BV is not None:
            self.seen_BV = self.seen_BV[index_B] if self.table.penalises else None


def _finish_reason(row: Row, token: int) -> FinishReason | None:
    request = row.request
    # The observer sees every token, also the last one.
    stopped = request.stop_when(token) or token in request.stop_token_ids
    if stopped:
        return "stop"
    return "length" if row.produced == request.max_new_tokens else None
