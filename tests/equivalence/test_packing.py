"""Packed = separate: outputs, losses, gradients, for every mixer and every way to pack."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sambay.data.batches import IGNORE, Batch, read_batch
from sambay.data.packing import PackedRows
from sambay.model import LanguageModel
from sambay.spec.model_config import Position
from tests.tiny import FAMILY, VOCAB, random_ids, tiny_model

LENGTHS = (1, 7, 2, 11, 4)  # a document of one token, of less than the convolution, over a window


@pytest.mark.parametrize("name", FAMILY)
def test_documents_of_a_row_do_not_see_each_other(name: str) -> None:
    model = tiny_model(name, position="none")  # rotation counts columns of the row, see below
    documents = [random_ids(1, length, seed) for seed, length in enumerate(LENGTHS)]
    row = torch.cat(documents, dim=1)
    segments = torch.repeat_interleave(torch.arange(5), torch.tensor(LENGTHS)).int()[None]

    packed = model(row, segments=segments)
    separate = torch.cat([model(document) for document in documents], dim=1)
    torch.testing.assert_close(packed, separate, rtol=1e-8, atol=1e-9)

    weights = torch.randn_like(packed)
    parameters = list(model.parameters())
    packed_grads = torch.autograd.grad(packed, parameters, weights)
    separate_grads = torch.autograd.grad(separate, parameters, weights)
    for (path, _), a, b in zip(model.named_parameters(), packed_grads, separate_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=path)


@torch.no_grad()
def test_rotation_is_relative() -> None:
    """Positions run over the whole row; only differences matter, so packing is unchanged."""
    model = tiny_model("transformer++")
    documents = [random_ids(1, 6, 1), random_ids(1, 9, 2)]
    segments = torch.tensor([[0] * 6 + [1] * 9], dtype=torch.int32)
    packed = model(torch.cat(documents, dim=1), segments=segments)
    separate = torch.cat([model(document) for document in documents], dim=1)
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_without_segments_documents_do_leak() -> None:
    """The test above would pass for a model that ignores context; this one would not."""
    model = tiny_model("sambay")
    a, b = random_ids(1, 6, 1), random_ids(1, 9, 2)
    leaking = model(torch.cat((a, b), dim=1))[:, 6:]
    assert not torch.allclose(leaking, model(b), atol=1e-3)


EOS = 0


class Texts:
    """What packing needs of a prepared set: documents of random tokens, each ended by EOS."""

    eos_id, folder, split = EOS, "texts", "train"

    def __init__(self, lengths: tuple[int, ...]) -> None:
        generator = np.random.default_rng(3)
        self.documents = [
            np.append(generator.integers(1, VOCAB, length), EOS) for length in lengths
        ]
        self.tokens = np.concatenate(self.documents)
        self.num_tokens = len(self.tokens)

    def read(self, start: int, count: int) -> np.ndarray:
        return self.tokens[start : start + count]

    def document_ends(self) -> np.ndarray:
        return np.cumsum([len(one) for one in self.documents])


def losses(model: LanguageModel, batch: Batch) -> torch.Tensor:
    """The loss of every label that counts, in order."""
    log_probs = model(batch.input_ids, segments=batch.segments).log_softmax(-1)
    counted = batch.labels != IGNORE
    return -log_probs[counted].gather(1, batch.labels[counted][:, None])[:, 0]


def alone(model: LanguageModel, pieces: list[np.ndarray]) -> torch.Tensor:
    """The same of pieces of documents, each a row of its own."""
    rows = [torch.from_numpy(piece)[None] for piece in pieces if len(piece) > 1]
    return torch.cat([losses(model, Batch(row[:, :-1], row[:, 1:], None)) for row in rows])


def assert_same_loss_and_gradients(
    model: LanguageModel, packed: torch.Tensor, separate: torch.Tensor
) -> None:
    # Rotation counts columns of the row, in float32.
    exact = model.config.position is Position.NONE
    tolerance = {"rtol": 1e-8, "atol": 1e-9} if exact else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(packed, separate, **tolerance)
    parameters = list(model.parameters())
    mine = torch.autograd.grad(packed.sum(), parameters)
    theirs = torch.autograd.grad(separate.sum(), parameters)
    for (path, _), a, b in zip(model.named_parameters(), mine, theirs, strict=True):
        scale = float(b.abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance["rtol"] * scale, msg=path)


@pytest.mark.parametrize("name", FAMILY)
def test_the_loss_of_a_window_is_that_of_its_documents_alone(name: str) -> None:
    """Windows cut documents anywhere; one ends exactly at the edge, one has a single token."""
    model, length = tiny_model(name), 18
    texts: Any = Texts((3, 1, 12, 7, 25, 2, 5))
    batch = read_batch(texts, range(3), length, segments=True)
    pieces = []
    for start in range(0, 3 * length, length):
        window = texts.tokens[start : start + length + 1]
        # A cut after every EOS, and no piece that only predicts what follows one.
        pieces += np.split(window, np.flatnonzero(window == EOS) + 1)
    assert_same_loss_and_gradients(model, losses(model, batch), alone(model, pieces))


@pytest.mark.parametrize("name", FAMILY)
def test_the_loss_of_whole_documents_in_rows_is_theirs_alone(name: str) -> None:
    model, length = tiny_model(name), 18
    texts: Any = Texts((3, 1, 12, 7, 18, 2, 5, 40))
    rows = PackedRows(texts, length)
    inputs, labels, segments = map(torch.from_numpy, rows.read(np.arange(rows.num_rows)))
    packed = losses(model, Batch(inputs, labels, segments))
    assert (labels == IGNORE).any()
    longest = texts.documents[-1]
    pieces = [*texts.documents[:-1], *(longest[at : at + length + 1] for at in (0, 18, 36))]
    separate = alone(model, pieces)
    # The rows have the documents in another order.
    assert_same_loss_and_gradients(model, packed.sort()[0], separate.sort()[0])


@torch.no_grad()
def test_a_neighbour_changes_no_loss() -> None:
    model = tiny_model("sambay")
    first: Any = Texts((9, 8, 12))
    second: Any = Texts((9, 8, 12))
    second.tokens[:9] = first.tokens[:9] % (VOCAB - 1) + 1
    second.tokens[-12:-1] = first.tokens[-12:-1] % (VOCAB - 1) + 1
    a, b = (losses(model, read_batch(one, [0], 30, segments=True)) for one in (first, second))
    assert len(a) == 30 - 2
    torch.testing.assert_close(a[9:17], b[9:17], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(a[:9], b[:9])
