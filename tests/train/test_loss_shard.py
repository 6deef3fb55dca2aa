"""The loss with the vocabulary split over two processes against the one-process loss."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sambay.train.loss import IGNORE, VocabularyShard, cross_entropy
from tests.train.processes import together

VOCAB = 11
OPTIONS = [{}, {"smoothing": 0.1}, {"z_loss": 1e-2}, {"smoothing": 0.3, "z_loss": 1e-3}]
SIZES = [(6, 5), (3, 8), (11, 0), (0, 11)]  # rows of the first process and of the second
DTYPES = [torch.float64, torch.bfloat16]


def _inputs(dtype: torch.dtype, ignored: bool) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    h = torch.randn(3, 5, 6, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCAB, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCAB, (3, 5), generator=generator)
    labels[0, 0], labels[0, 1] = 0, VOCAB - 1
    if ignored:
        labels[1] = IGNORE
    weight = weight.to(torch.promote_types(dtype, torch.float32))
    return h.requires_grad_(), weight.requires_grad_(), labels


def _process(rendezvous: Path) -> int:
    rank = int(os.environ["RANK"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    group = dist.new_group([0, 1])
    assert group is not None
    compared = 0
    for dtype in DTYPES:
        exact = dtype == torch.float64
        for sizes in SIZES:
            for options in OPTIONS:
                for chunk in (4, None):
                    h, weight, labels = _inputs(dtype, ignored=chunk == 4)
                    whole = cross_entropy(h, weight, labels, chunk=chunk, **options)
                    wanted = torch.autograd.grad(whole.objective / 7, (h, weight))
                    first = sum(sizes[:rank])
                    rows = slice(first, first + sizes[rank])
                    mine = weight.detach()[rows].requires_grad_()
                    shard = VocabularyShard(group, first, VOCAB)
                    split = cross_entropy(h, mine, labels, chunk=chunk, shard=shard, **options)
                    gradients = torch.autograd.grad(split.objective / 7, (h, mine))
                    close = (
                        {"rtol": 1e-12, "atol": 1e-12} if exact else {"rtol": 2e-2, "atol": 1e-2}
                    )
                    for one, other in zip(split, whole, strict=True):
                        torch.testing.assert_close(one, other, **close)
                    torch.testing.assert_close(gradients[0], wanted[0], **close)
                    torch.testing.assert_close(gradients[1], wanted[1][rows], **close)
                    values = [torch.empty_like(split.objective) for _ in range(2)]
                    dist.all_gather(values, split.objective.detach())
                    assert torch.equal(*values), "both processes see the same loss"
                    compared += 1
    h, weight, labels = _inputs(torch.float64, ignored=False)
    labels[2, 2] = VOCAB
    with pytest.raises(IndexError, match="out of bounds of the 11 classes"):
        cross_entropy(h, weight[:5], labels, shard=VocabularyShard(group, 0, VOCAB))
    dist.destroy_process_group()
    return compared


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_a_split_vocabulary_equals_a_whole_one(tmp_path: Path) -> None:
    every = len(DTYPES) * len(SIZES) * len(OPTIONS) * 2
    assert together(2, lambda: _process(tmp_path / "rendezvous"), tmp_path) == [every, every]
