"""Packed = separate: outputs, gradients, for every mixer."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import NAMES, random_ids, tiny_model

LENGTHS = (1, 7, 2, 11, 4)  # a document of one token, of less than the convolution, over a window


@pytest.mark.parametrize("name", NAMES)
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
