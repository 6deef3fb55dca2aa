"""The loss on held-out text, per token and per byte, of several sets and lengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from sambay.data.batches import Batch, evaluation_batches
from sambay.data.shards import TokenDataset
from sambay.train.config import RunConfig
from sambay.train.sources import ValidationSet


@dataclass(frozen=True)
class Evaluation:
    """What a model achieves on a text.

    loss: nats per token. bits_per_byte: all nats in bits, over the bytes those tokens stand for.
    parts: of a mean over several texts, each of them, by "NAME/LENGTH".
    """

    loss: float
    bits_per_byte: float
    tokens: int
    text_bytes: int
    parts: dict[str, Evaluation] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """The values for the log, by name."""
        values = {"validation_loss": self.loss, "validation_bits_per_byte": self.bits_per_byte}
        for name, part in self.parts.items():
            values[f"validation/{name}/loss"] = part.loss
            values[f"validation/{name}/bits_per_byte"] = part.bits_per_byte
        return values


def evaluate_all(
    batch_loss: Callable[[Batch], torch.Tensor], sets: Sequence[ValidationSet], config: RunConfig
) -> Evaluation:
    """The mean over all sets at the shortest length, and each set at each length as `parts`.

    The mean weights the losses per token of the sets; its bits per byte are those of a text of
    which the sets have these shares in tokens. Parts are left out if there is only one.
    """
    length, lengths = config.data.sequence_length, config.evaluation.lengths
    parts, first = {}, []
    for multiple in lengths:
        for one in sets:
            measured = evaluate(batch_loss, one.dataset, config, multiple=multiple)
            parts[f"{one.name}/{multiple * length}"] = measured
            if multiple == lengths[0]:
                first.append((one.weight, measured))
    if len(parts) == 1:
        return first[0][1]
    loss = sum(weight * part.loss for weight, part in first)
    bytes_per_token = sum(weight * part.text_bytes / part.tokens for weight, part in first)
    return Evaluation(
        loss,
        loss / math.log(2) / max(bytes_per_token, 1e-9),
        sum(part.tokens for _, part in first),
        sum(part.text_bytes for _, part in first),
        parts,
    )


@torch.no_grad()
def evaluate(
    batch_loss: Callable[[Batch], torch.Tensor],
    dataset: TokenDataset,
    config: RunConfig,
    *,
    multiple: int = 1,
) -> Evaluation:
    """The loss over the first `evaluation.max_tokens` of a split, or all of it.

    `batch_loss` gives the summed nats of a batch. Rows have `multiple` times the training length,
    and as many fewer go into one batch, so memory does not grow with it. Every token but the
    split's first is predicted once, with what stands before it in its window as context.
    End-of-document tokens count in the nats and stand for no bytes, so bits per byte are those of a
    code that can be decoded. With `data.separate_documents` the first token of each document is not
    predicted, as in training; neither its nats nor its bytes count.
    """
    limit = config.evaluation.max_tokens
    length = config.data.sequence_length * multiple
    batches = evaluation_batches(
        dataset,
        length,
        max(1, config.batch.micro_batch_size // multiple),
        segments=config.data.separate_documents,
        max_windows=None if limit is None else max(1, limit // length),
    )
    nats, tokens, text_bytes = 0.0, 0, 0
    for batch in batches:
        nats += float(batch_loss(batch))
        tokens += batch.num_labels
        text_bytes += batch.text_bytes
    return Evaluation(nats / tokens, nats / math.log(2) / max(text_bytes, 1), tokens, text_bytes)
