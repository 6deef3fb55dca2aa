"""The Mamba-2 scan by matrix products in plain torch, for any device.

Within a chunk of tokens, and from the state S before it,

    y_t   = sum over s <= t of exp(L_t - L_s) (C_t . B_s) dt_s x_s  +  exp(L_t) S C_t  +  D x_t
    S_end = exp(L_end) S  +  sum over s of exp(L_end - L_s) dt_s x_s B_s^T

where L is the sum of the log decays dt * A of the chunk up to a token (arXiv 2405.21060, section
6). Decays appear only as exponentials of differences of L, never as quotients of products, so
nothing overflows; L is summed in float64, so that a difference of large sums is still right. Only
the states between chunks are kept for the backward, which is written by hand.

Several chunks, a span, can be computed at once; then only the states go through one after another.
Inside a span the first dimension is R, the rows of its first chunk before those of the next; c is a
token of the chunk. S counts the chunks of a span.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from sambay.ops.state_space_dual.operator import define, gradients_for, outputs_for

CHUNK = 64  # tokens; the fastest on CPUs, where the work per token grows with it


class _Span(NamedTuple):
    """Some chunks of tokens in computing precision, and the decays within them."""

    z: Tensor  # (R, c, H): delta + delta_bias
    dt: Tensor  # (R, c, H)
    x: Tensor  # (R, c, H, P)
    B: Tensor  # (R, c, N)
    C: Tensor  # (R, c, N)
    between: Tensor  # (R, H, c, c): decay from after token s to after token t, zero where s > t
    since: Tensor  # (R, c, H): decay from before the chunk to after a token
    until: Tensor  # (R, c, H): decay from after a token to the end of the chunk

    @property
    def through(self) -> Tensor:
        """(R, H): decay over the whole chunk."""
        return self.since[:, -1]


def _span(
    tokens: slice,
    chunks: int,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    delta_bias: Tensor,
    resets: Tensor | None,
) -> _Span:
    x_RcHP, delta_RcH, B_RcN, C_RcN = (
        _cut(tensor, tokens, chunks).to(A.dtype) for tensor in (x, delta, B, C)
    )
    z_RcH = delta_RcH + delta_bias
    dt_RcH = softplus(z_RcH)
    L_RcH = (dt_RcH * A).double().cumsum(1)
    hidden_cc = torch.ones(*L_RcH.shape[1:2] * 2, dtype=torch.bool, device=x.device).triu_(1)
    since_RcH, until_RcH = L_RcH, L_RcH[:, -1:] - L_RcH
    if resets is not None:
        document_Rc = _cut(resets, tokens, chunks).cumsum(1)
        hidden_Rcc = hidden_cc | (document_Rc[:, :, None] != document_Rc[:, None])
        hidden_cc = hidden_Rcc[:, None]
        forgotten_Rc = document_Rc > 0
        since_RcH = since_RcH.masked_fill(forgotten_Rc[..., None], -torch.inf)
        ended_Rc = document_Rc != document_Rc[:, -1:]
        until_RcH = until_RcH.masked_fill(ended_Rc[..., None], -torch.inf)
    between_RHcc = _differences(L_RcH.transpose(1, 2), A.dtype)
    between_RHcc.masked_fill_(hidden_cc, -torch.inf).exp_()
    since_RcH, until_RcH = (log.to(A.dtype).exp_() for log in (since_RcH, until_RcH))
    return _Span(z_RcH, dt_RcH, x_RcHP, B_RcN, C_RcN, between_RHcc, since_RcH, until_RcH)


def _differences(L: Tensor, dtype: torch.dtype) -> Tensor:
    """L_t - L_s as (..., t, s), where L is float64, exact to `dtype` without a large float64."""
    if dtype == torch.float64:
        return L[..., :, None] - L[..., None, :]
    high = L.to(dtype)
    low = (L - high).to(dtype)
    difference = high[..., :, None] - high[..., None, :]
    return difference.add_(low[..., :, None]).sub_(low[..., None, :])


def _spans(x: Tensor) -> Iterator[tuple[int, slice, int]]:
    """(first chunk, tokens, chunks) of every span; a shorter last chunk is one of its own."""
    length, most = x.shape[1], _chunks_at_once(x)
    whole = length // CHUNK
    for first in range(0, whole, most):
        chunks = min(most, whole - first)
        yield first, slice(first * CHUNK, (first + chunks) * CHUNK), chunks
    if length % CHUNK:
        yield whole, slice(whole * CHUNK, length), 1


def _chunks_at_once(x: Tensor) -> int:
    """Accelerators wait for the launch of every small step, so they get fewer, larger ones."""
    return 1 if x.device.type == "cpu" else 16


def _cut(tensor: Tensor, tokens: slice, chunks: int) -> Tensor:
    """(B, T, ...) to (R, c, ...)."""
    return tensor[:, tokens].unflatten(1, (chunks, -1)).transpose(0, 1).flatten(0, 1)


def _paste(values: Tensor, into: Tensor, tokens: slice, chunks: int) -> None:
    """(R, c, ...) to the tokens of (B, T, ...)."""
    there = into[:, tokens].unflatten(1, (chunks, -1)).transpose(0, 1)
    there.copy_(values.unflatten(0, (chunks, -1)))


def forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    initial_state: Tensor | None,
    resets: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final state, saved states), see `operator.define`."""
    y, final_state, saved = outputs_for(x, A, B, CHUNK, save)
    # The states around the chunks of all spans, or of one span after another, in the same memory.
    states = saved if save else A.new_empty(_chunks_at_once(x) + 1, *final_state.shape)
    states[0] = 0 if initial_state is None else initial_state
    last = 0
    for first, tokens, chunks in _spans(x):
        k = _span(tokens, chunks, x, delta, A, B, C, delta_bias, resets)
        if not save and last:
            states[0] = states[last]
        start = first if save else 0
        last = start + chunks
        inputs_RcHP = (k.until * k.dt)[..., None] * k.x
        _outer(inputs_RcHP, k.B, states[start + 1 : last + 1].flatten(0, 1))
        decays_SBH = k.through.unflatten(0, (chunks, -1))
        for index, decay_BH in enumerate(decays_SBH, start):
            states[index + 1].addcmul_(decay_BH[..., None, None], states[index])
        scores_RHcc = k.between * torch.bmm(k.C, k.B.mT)[:, None]
        y_RHcP = torch.matmul(scores_RHcc, _by_head(k.x, k.dt))
        y_RcHP = _read(states[start:last].flatten(0, 1), k.C).mul_(k.since[..., None])
        y_RcHP.add_(y_RHcP.transpose(1, 2)).addcmul_(k.x, D[:, None])
        _paste(y_RcHP, y, tokens, chunks)
    final_state.copy_(states[last])
    return y, final_state, saved


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    initial_state: Tensor | None,
    resets: Tensor | None,
    saved: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients, see `operator.define`."""
    gradients = gradients_for(x, delta, A, B, initial_state)
    dx, ddelta, dA, dB, dC, dD, dbias, dinitial = gradients
    for total in (dA, dD, dbias):
        total.zero_()
    dstates = torch.empty_like(saved[: _chunks_at_once(x) + 1])  # around the chunks of a span
    dstates[0] = 0 if dfinal is None else dfinal
    for first, tokens, chunks in reversed(list(_spans(x))):
        k = _span(tokens, chunks, x, delta, A, B, C, delta_bias, resets)
        dy_RcHP = _cut(dy, tokens, chunks).to(A.dtype)
        before_RHPN = saved[first : first + chunks].flatten(0, 1)

        # The states, last chunk first: from dL/dS behind a chunk to the one before it.
        dstates[chunks] = dstates[0]
        dyd_RcHP = dy_RcHP * k.since[..., None]
        _outer(dyd_RcHP, k.C, dstates[:chunks].flatten(0, 1))
        decays_SBH = k.through.unflatten(0, (chunks, -1))
        for index in reversed(range(chunks)):
            dstates[index].addcmul_(decays_SBH[index, ..., None, None], dstates[index + 1])
        dafter_RHPN = dstates[1 : chunks + 1].flatten(0, 1)

        # Within the chunks. `between` becomes the gradient of its own logarithm.
        u_RHcP, dy_RHcP = _by_head(k.x, k.dt), dy_RcHP.transpose(1, 2).contiguous()
        products_Rcc = torch.bmm(k.C, k.B.mT)
        du_RHcP = torch.matmul((k.between * products_Rcc[:, None]).mT, dy_RHcP)
        dlog_RHcc = torch.matmul(dy_RHcP, u_RHcP.mT).mul_(k.between)
        dproducts_Rcc = dlog_RHcc.sum(1)
        da_RcH = _along_the_way(dlog_RHcc.mul_(products_Rcc[:, None]))

        # Into and out of the states.
        du_RcHP = _read(dafter_RHPN, k.B).mul_(k.until[..., None])
        to_end_RcH = (du_RcHP * k.x).sum(-1).mul_(k.dt)  # gradient of the logarithm of `until`
        from_start_RcH = (_read(before_RHPN, k.C) * dyd_RcHP).sum(-1)  # ... and of `since`
        whole_RH = _dot(dafter_RHPN, before_RHPN).mul_(k.through)  # ... of both
        # A token's decay lies on the way to the end for those before it, and on the way from the
        # start for itself and those behind it.
        da_RcH[:, 1:] += to_end_RcH.cumsum(1)[:, :-1]
        da_RcH += from_start_RcH.flip(1).cumsum(1).flip(1).add_(whole_RH[:, None])

        du_RcHP.add_(du_RHcP.transpose(1, 2))
        ended_RcHP = (k.until * k.dt)[..., None] * k.x
        dC_RcN = torch.bmm(dproducts_Rcc, k.B).baddbmm_(
            dyd_RcHP.flatten(2), before_RHPN.flatten(1, 2)
        )
        dB_RcN = torch.bmm(dproducts_Rcc.mT, k.C).baddbmm_(
            ended_RcHP.flatten(2), dafter_RHPN.flatten(1, 2)
        )
        ddt_RcH = (du_RcHP * k.x).sum(-1).addcmul_(da_RcH, A)
        dA += (da_RcH * k.dt).sum((0, 1))
        # exp(logsigmoid) is the slope of softplus without cancellation.
        dz_RcH = ddt_RcH.mul_(logsigmoid(k.z).exp_())
        dbias += dz_RcH.sum((0, 1))
        dD += (dy_RcHP * k.x).sum((0, 1, 3))
        dx_RcHP = du_RcHP.mul_(k.dt[..., None]).addcmul_(dy_RcHP, D[:, None])
        for values, gradient in ((dx_RcHP, dx), (dz_RcH, ddelta), (dB_RcN, dB), (dC_RcN, dC)):
            _paste(values, gradient, tokens, chunks)
    if dinitial.numel():
        dinitial.copy_(dstates[0])
    return gradients


def _by_head(x_RcHP: Tensor, scale_RcH: Tensor) -> Tensor:
    """scale * x as contiguous (R, H, c, P), which products of whole heads want."""
    R, c, H, P = x_RcHP.shape
    scaled = x_RcHP.new_empty(R, H, c, P)
    return torch.mul(x_RcHP.transpose(1, 2), scale_RcH.transpose(1, 2)[..., None], out=scaled)


def _outer(values_RcHP: Tensor, weights_RcN: Tensor, into_RHPN: Tensor) -> None:
    """Write the sum over a chunk's tokens of their outer products."""
    torch.bmm(values_RcHP.flatten(2).mT, weights_RcN, out=into_RHPN.flatten(1, 2))


def _dot(a_RHPN: Tensor, b_RHPN: Tensor) -> Tensor:
    """The sum over P and N of a * b, (R, H), without their product in memory."""
    a, b = a_RHPN.flatten(0, 1).flatten(1), b_RHPN.flatten(0, 1).flatten(1)
    return torch.bmm(a[:, None], b[..., None]).view(a_RHPN.shape[:2])


def _read(state_RHPN: Tensor, weights_RcN: Tensor) -> Tensor:
    """What the tokens of a chunk read from one state, (R, c, H, P)."""
    values = torch.bmm(weights_RcN, state_RHPN.flatten(1, 2).mT)
    return values.unflatten(2, state_RHPN.shape[1:3])


def _along_the_way(dlog_RHcc: Tensor) -> Tensor:
    """The gradient of every token's log decay, (R, c, H), from those of the decays between tokens.

    The decay from s to t contains that of each token r with s < r <= t. The sums are taken as they
    stand: a difference of the sums over t and over s would lose small gradients among large ones.
    """
    size = dlog_RHcc.shape[-1]
    before_cc = torch.ones(size, size, dtype=dlog_RHcc.dtype, device=dlog_RHcc.device).triu_(1)
    da_RHc = torch.matmul(dlog_RHcc, before_cc).tril_().sum(-2)
    return da_RHc.transpose(1, 2).contiguous()


scan = define("state_space_dual_chunked", forward, backward, CHUNK)
