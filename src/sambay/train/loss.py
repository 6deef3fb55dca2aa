"""Cross-entropy of hidden states against an output matrix, without ever holding all the logits.

Shape letters: M tokens (any leading shape, flattened), C tokens of a chunk, D hidden, V vocabulary
(with a shard: the rows this process holds).

torch 2.13 has `linear_cross_entropy`. It is not used: it forms all logits as soon as labels are
smoothed, has no z-loss, no vocabulary split over processes, and older versions lack it
(docs/results/loss.md compares them).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sambay.train.cost import chunk_tokens

IGNORE = -100  # a label that counts neither in the sum nor among the tokens
_PRODUCT_VALUES = 2**24  # of a partial weight gradient that exists before it is added


class Losses(NamedTuple):
    """Sums over all counted tokens, fp32 scalars.

    objective: what training minimises, smoothed and with the z-loss; the only one with a gradient.
    nats: the cross-entropy to the labels themselves, comparable between all settings.
    z: squared log-sum-exp of the logits, without a coefficient.
    """

    objective: Tensor
    nats: Tensor
    z: Tensor


class VocabularyShard(NamedTuple):
    """Which rows of the output matrix this process holds, when each holds some.

    The shards of `group` are consecutive, disjoint and cover `vocab_size` rows; they may differ in
    size, also be empty. `first_row` is the number of this one's first row.
    """

    group: dist.ProcessGroup
    first_row: int
    vocab_size: int


def cross_entropy_reference(
    h_MD: Tensor,
    weight_VD: Tensor,
    labels_M: Tensor,
    *,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Losses:
    """The same sums from logits that exist in full: the definition."""
    logits_MV = h_MD.flatten(0, -2) @ weight_VD.to(h_MD.dtype).t()
    logits_MV = logits_MV.to(torch.promote_types(h_MD.dtype, torch.float32))
    labels_M = labels_M.flatten()

    def nats(smoothing: float) -> Tensor:
        return F.cross_entropy(
            logits_MV, labels_M, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing
        )

    z = (logits_MV.logsumexp(-1).square() * (labels_M != IGNORE)).sum()
    return Losses(nats(smoothing) + z_loss * z, nats(0.0).detach(), z.detach())


def cross_entropy(
    h_MD: Tensor,
    weight_VD: Tensor,
    labels_M: Tensor,
    *,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int | None = None,
    shard: VocabularyShard | None = None,
) -> Losses:
    """The summed losses over all labels that are not `IGNORE`.

    `h_MD` (..., D) fp32 or bf16, `weight_VD` fp32 or h's dtype, `labels_M` (...) int64. Per token,
    with l = logsumexp(logits):

        objective = (1 - smoothing) (l - logits[label]) + smoothing (l - mean(logits)) + z_loss l^2

    The products run in h's dtype, softmax and all sums, that of the weight gradient too, in fp32
    (float64 for float64 input). At most `chunk` tokens have logits at a time; tokens that do not
    count have none. The gradients of h and weight are formed beside the loss while a chunk's
    logits are still there, which costs the same three products as plain cross-entropy
    (recomputing the logits in backward measured 1.3 times the time). They exist once, so
    `backward` works once, with or without `retain_graph`.

    Arguments are plain tensors: a weight sharded by rows for storage has to be gathered before.
    With `shard` each process of its group gives its own rows as `weight_VD`, and the same h and
    labels; each gets the whole losses, the whole gradient of h and that of its rows.
    """
    h_MD, labels_M = h_MD.flatten(0, -2), labels_M.flatten()
    if chunk is None:
        rows = weight_VD.shape[0]
        if shard is not None:  # the same for all, as they meet after every chunk
            rows = -(-shard.vocab_size // dist.get_world_size(shard.group))
        chunk = chunk_tokens(rows)
    enabled = torch.is_grad_enabled()
    wanted = (enabled and h_MD.requires_grad, enabled and weight_VD.requires_grad)
    settings = _Settings(smoothing, z_loss, chunk, shard, *wanted)
    return Losses(*_ChunkedCrossEntropy.apply(h_MD, weight_VD, labels_M, settings))


class _Settings(NamedTuple):
    smoothing: float
    z_loss: float
    chunk: int
    shard: VocabularyShard | None
    wants_dh: bool
    wants_dweight: bool


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, settings: _Settings
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(h_MD.device.type, enabled=False):
            counted_M = labels_M != IGNORE
            if bool(counted_M.all()):
                losses, dh_MD, dweight_VD = _chunked(h_MD, weight_VD, labels_M, settings)
            else:
                kept = counted_M.nonzero().squeeze(1)
                losses, dkept, dweight_VD = _chunked(
                    h_MD[kept], weight_VD, labels_M[kept], settings
                )
                dh_MD = None
                if dkept is not None:
                    dh_MD = torch.zeros_like(h_MD).index_copy_(0, kept, dkept)
        # Not by save_for_backward: backward takes them away instead of making scaled copies.
        ctx.gradients, ctx.weight_dtype = (dh_MD, dweight_VD), weight_VD.dtype
        ctx.mark_non_differentiable(losses.nats, losses.z)
        return losses.objective, losses.nats, losses.z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("cross_entropy: backward works once; call it again for another")
        dh_MD, dweight_VD = ctx.gradients
        ctx.gradients = None
        factor = gradients[0]
        if dh_MD is not None:
            # Where h is bf16 the factor must not be rounded to it, so the product is in fp32.
            dh_MD = (dh_MD.to(factor.dtype) * factor).to(dh_MD.dtype)
        if dweight_VD is not None:
            dweight_VD = dweight_VD.mul_(factor).to(ctx.weight_dtype)
        return dh_MD, dweight_VD, None, None


def _chunked(
    h_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, settings: _Settings
) -> tuple[Losses, Tensor | None, Tensor | None]:
    """The losses, and the gradients of the objective that are wanted."""
    sums = {"dtype": torch.promote_types(h_MD.dtype, torch.float32), "device": h_MD.device}
    shard = settings.shard
    if shard is not None:  # without, gathering refuses it
        outside = (labels_M < 0) | (labels_M >= shard.vocab_size)
        if bool(outside.any()):
            raise IndexError(f"a label is out of bounds of the {shard.vocab_size} classes")
    matrix_VD = weight_VD.to(h_MD.dtype)
    dh_MD, dweight_VD = None, None
    if settings.wants_dh:  # the parts of several processes are added in fp32
        dh_MD = torch.empty_like(h_MD) if shard is None else torch.empty(h_MD.shape, **sums)
    if settings.wants_dweight:
        dweight_VD = torch.zeros(weight_VD.shape, **sums)

    # Large enough that allocating them once per chunk would be felt.
    size = (min(settings.chunk, h_MD.shape[0]), matrix_VD.shape[0])
    values_CV = torch.empty(size, **sums)
    narrow_CV = values_CV
    if h_MD.dtype != values_CV.dtype:
        narrow_CV = torch.empty(size, dtype=h_MD.dtype, device=h_MD.device)
    totals = torch.zeros(3, **sums)
    for start in range(0, h_MD.shape[0], settings.chunk):
        part_CD = h_MD[start : start + settings.chunk]
        values, narrow = values_CV[: part_CD.shape[0]], narrow_CV[: part_CD.shape[0]]
        torch.mm(part_CD, matrix_VD.t(), out=narrow)
        if narrow is not values:
            values.copy_(narrow)
        chunk_labels = labels_M[start : start + settings.chunk]
        totals += _losses_and_derivative_(values, chunk_labels, settings)
        if narrow is not values:
            narrow.copy_(values)
        if dh_MD is not None:
            dh_MD[start : start + settings.chunk] = narrow @ matrix_VD
        if dweight_VD is not None:
            _add_product_(dweight_VD, narrow, part_CD)
    if dh_MD is not None and shard is not None:
        dist.all_reduce(dh_MD, group=shard.group)
        dh_MD = dh_MD.to(h_MD.dtype)
    return Losses(*totals.unbind()), dh_MD, dweight_VD


def _losses_and_derivative_(values_CV: Tensor, labels_C: Tensor, settings: _Settings) -> Tensor:
    """The three sums of a chunk; its logits are replaced by the derivative of the objective."""
    smoothing, z_loss, _, shard, *wanted = settings
    rows = vocab_size = values_CV.shape[1]
    mine_C = None  # whose label is in this shard, where there are several
    if shard is not None:
        vocab_size = shard.vocab_size
        labels_C = labels_C - shard.first_row
        mine_C = (labels_C >= 0) & (labels_C < rows)
    # An empty shard has no largest logit and nothing to gather from.
    largest_C = values_CV.amax(1) if rows else values_CV.new_full(labels_C.shape, float("-inf"))
    if shard is not None:
        dist.all_reduce(largest_C, dist.ReduceOp.MAX, group=shard.group)
    values_CV.sub_(largest_C[:, None])

    label_C = _at_labels(values_CV, labels_C, mine_C)
    all_C = values_CV.sum(1) if smoothing else torch.zeros_like(label_C)
    sum_C = values_CV.exp_().sum(1)
    if shard is not None:
        parts = torch.stack((label_C, all_C, sum_C))
        dist.all_reduce(parts, group=shard.group)
        label_C, all_C, sum_C = parts.unbind()
    log_C = sum_C.log()
    nats_C, lse_C = log_C - label_C, log_C + largest_C
    objective_C = nats_C
    if smoothing:
        objective_C = (1 - smoothing) * nats_C + smoothing * (log_C - all_C / vocab_size)
    if z_loss:
        objective_C = objective_C + z_loss * lse_C.square()

    if any(wanted):
        # softmax (1 + 2 z l) - (1 - smoothing) [label] - smoothing / V
        values_CV.mul_(((1 + 2 * z_loss * lse_C) / sum_C)[:, None])
        if smoothing:
            values_CV.sub_(smoothing / vocab_size)
        if rows:
            hit_C = torch.full_like(label_C, smoothing - 1)
            if mine_C is not None:
                hit_C, labels_C = hit_C * mine_C, labels_C.clamp(0, rows - 1)
            values_CV.scatter_add_(1, labels_C[:, None], hit_C[:, None])
    return torch.stack((objective_C.sum(), nats_C.sum(), lse_C.square().sum()))


def _at_labels(values_CV: Tensor, labels_C: Tensor, mine_C: Tensor | None) -> Tensor:
    """The value at each label, 0 where another process has it."""
    if mine_C is None:
        return values_CV.gather(1, labels_C[:, None])[:, 0]
    if not values_CV.shape[1]:
        return values_CV.new_zeros(labels_C.shape)
    labels_C = labels_C.clamp(0, values_CV.shape[1] - 1)
    return values_CV.gather(1, labels_C[:, None])[:, 0].masked_fill(~mine_C, 0.0)


def _add_product_(total_VD: Tensor, left_CV: Tensor, right_CD: Tensor) -> None:
    """total += left^T right; a product in another dtype than the total exists a slice at a time."""
    if total_VD.dtype == left_CV.dtype:
        total_VD.addmm_(left_CV.t(), right_CD)
        return
    rows = max(1, _PRODUCT_VALUES // right_CD.shape[1])
    for first in range(0, total_VD.shape[0], rows):
        total_VD[first : first + rows] += left_CV[:, first : first + rows].t() @ right_CD
