"""The loss on held-out text, per token and per byte."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sambay.data.batches import Batch, evaluation_batches
from sambay.data.shards import TokenDataset
from sambay.train.config import RunConfig


@dataclass(frozen=True)
class Evaluation:
    """What a model achieves on a text.

    loss: nats per token. bits_per_byte: all nats in bits, over the bytes those tokens stand for.
    """

    loss: float
    bits_per_byte: float
    tokens: int
    text_bytes: int


@torch.no_grad()
def evaluate(
    batch_loss: Callable[[Batch], torch.Tensor], dataset: TokenDataset, config: RunConfig
) -> Evaluation:
    """The loss over the first `evaluation.max_tokens` of a split, or all of it.

    `batch_loss` gives the summed nats of a batch. Every token but the split's first is predicted
    once, with what stands before it in its window as context. End-of-document tokens count in the
    nats and stand for no bytes, so bits per byte are those of a code that can be decoded.
    """
    limit = config.evaluation.max_tokens
    length = config.data.sequence_length
    batches = evaluation_batches(
        dataset,
        length,
        config.batch.micro_batch_size,
        segments=config.data.separate_documents,
        max_windows=None if limit is None else max(1, limit // length),
    )
    nats, tokens, text_bytes = 0.0, 0, 0
    for batch in batches:
        nats += float(batch_loss(batch))
        tokens += batch.num_labels
        text_bytes += batch.text_bytes
    return Evaluation(nats / tokens, nats / math.log(2) / max(text_bytes, 1), tokens, text_bytes)
