"""The gated delta rule in plain torch: matrix products over chunks of tokens.

Inside a chunk with state S_0 before it (arXiv 2412.06464, section 3.3 and appendix A, in a form
where beta and the decays enter through one matrix), let e_i be the decay from before the chunk to
token i, and G_ij = beta_j times the decay from token j to token i, for j <= i. With

    y_i = v_i - (exp(g_i) S_{i-1})^T k_i        the change that token i asks for

it holds that

    (I + L) Y = V - (e * K) S_0                 L_ij = G_ij k_i.k_j  for j < i
    O = (e * Q) S_0 + P Y                       P_ij = G_ij q_i.k_j  for j <= i (Q has the scale)
    S_end = e_C S_0 + (G_C * K)^T Y

I + L is unit lower triangular. Its inverse has entries of at most beta for unit keys, so that it
can be made first, for all chunks together; a power series in L could not, its terms being huge for
beta near 2. What is left to do chunk after chunk are products with the state.

A decay is the exponential of a sum over the tokens it spans, formed as a difference of float64
sums, never a quotient of decays. A document that starts between two tokens zeroes it.
Inside, chunks come first: (N, M, C, ...) for N chunks of C tokens and M = rows times heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sambay.ops.gated_delta.operator import define

# The most tokens in a chunk, for keys of at most so many elements: where reading the state costs
# little, pairs of tokens are the larger part of the work (measured on a CPU).
CHUNKS = ((32, 16), (128, 32))
CHUNK_OF_LONG_KEYS = 64


class _Tokens(NamedTuple):
    """Everything of a call that does not depend on the state."""

    q: Tensor  # (N, M, C, K), times the scale
    k: Tensor  # (N, M, C, K)
    v: Tensor  # (N, M, C, V)
    beta: Tensor  # (N, M, 1, C)
    decay: Tensor  # (N, M, C, C): from token j (the column) to token i, 0 where j > i
    entry: Tensor  # (N, M, C, 1): e, from before the chunk to token i
    weight: Tensor  # (N, M, C, C): G
    last: Tensor  # (N, M, C, 1): the last row of G as a column
    end: Tensor  # (N, M, 1, 1): the last entry of e


def chunk_size(length: int, keys: int) -> tuple[int, int]:
    """(number of chunks, tokens in each): equal chunks, so that little is padded."""
    most = next((size for limit, size in CHUNKS if keys <= limit), CHUNK_OF_LONG_KEYS)
    chunks = (length + most - 1) // most
    return chunks, (length + chunks - 1) // chunks


def _by_chunk(tensor_BTH: Tensor, chunks: int, size: int, dtype: torch.dtype) -> Tensor:
    """(B, T, H, ...) as (N, B * H, C, ...), with zeros after the last token."""
    rows, length, heads, *rest = tensor_BTH.shape
    tensor = tensor_BTH.to(dtype)
    if chunks * size > length:
        tensor = pad(tensor, (0, 0) * (len(rest) + 1) + (0, chunks * size - length))
    tensor = tensor.unflatten(1, (chunks, size)).transpose(0, 1).transpose(2, 3)
    return tensor.reshape(chunks, rows * heads, size, *rest)


def _by_token(tensor_NMC: Tensor, like_BTH: Tensor) -> Tensor:
    """The reverse of `_by_chunk`: (N, B * H, C, ...) as contiguous (B, T, H, ...) like another."""
    rows, length, heads = like_BTH.shape[:3]
    tensor = tensor_NMC.unflatten(1, (rows, heads)).transpose(2, 3).transpose(0, 1)
    result = like_BTH.new_empty(rows, *tensor.shape[1:3], *like_BTH.shape[2:])
    return result.copy_(tensor).flatten(1, 2)[:, :length].contiguous()


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    resets: Tensor | None,
    scale: float,
) -> _Tokens:
    compute = log_decay.dtype
    chunks, size = chunk_size(q.shape[1], q.shape[3])
    q_NMCK, k_NMCK, v_NMCV = (_by_chunk(x, chunks, size, compute) for x in (q, k, v))
    beta_NMC = _by_chunk(beta, chunks, size, compute)
    total_NMC = _by_chunk(log_decay, chunks, size, torch.float64).cumsum(-1)
    later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu_(1)
    entry_NMC = total_NMC.exp().to(compute)
    decay_NMCC = (total_NMC[..., :, None] - total_NMC[..., None, :]).to(compute)
    if resets is not None:
        heads = q.shape[2]
        documents_NBC = _by_chunk(resets[..., None], chunks, size, torch.int32).cumsum(-1)
        other_NBCC = documents_NBC[..., :, None] != documents_NBC[..., None, :]
        later = (other_NBCC | later).repeat_interleave(heads, 1)
        entry_NMC.masked_fill_((documents_NBC > 0).repeat_interleave(heads, 1), 0.0)
    decay_NMCC = decay_NMCC.masked_fill_(later, -torch.inf).exp_()
    weight_NMCC = decay_NMCC * beta_NMC[..., None, :]
    return _Tokens(
        q_NMCK * scale,
        k_NMCK,
        v_NMCV,
        beta_NMC[:, :, None],
        decay_NMCC,
        entry_NMC[..., None],
        weight_NMCC,
        weight_NMCC[:, :, -1, :, None],
        entry_NMC[:, :, -1:, None],
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    resets: Tensor | None,
    scale: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o, final state, Y, inverse of I + L), see `operator.define`."""
    c = _prepare(q, k, v, log_decay, beta, resets, scale)
    _, final_state, changes_NMCV, inverse_NMCC = outputs_for(
        q, k, v, log_decay, beta, initial_state, resets, scale, save
    )
    inverse = _inverse((c.k @ c.k.mT).mul_(c.weight))
    reach_NMCC = (c.q @ c.k.mT).mul_(c.weight)
    reads_NMCK = inverse @ (c.entry * c.k)
    asked_NMCV = inverse @ c.v
    entering_NMCK = c.entry * c.q
    leaving_NMKC = (c.last * c.k).mT
    state_MKV = _start(c, initial_state)
    outputs = torch.empty_like(asked_NMCV)
    for n in range(len(c.k)):
        y_MCV = torch.baddbmm(asked_NMCV[n], reads_NMCK[n], state_MKV, alpha=-1)
        torch.bmm(entering_NMCK[n], state_MKV, out=outputs[n])
        outputs[n].baddbmm_(reach_NMCC[n], y_MCV)
        state_MKV = torch.baddbmm(c.end[n] * state_MKV, leaving_NMKC[n], y_MCV)
        if save:
            changes_NMCV[n] = y_MCV
    if save:
        inverse_NMCC.copy_(inverse)
    final_state.copy_(state_MKV.view(final_state.shape))
    return _by_token(outputs, v), final_state, changes_NMCV, inverse_NMCC


def backward(
    do: Tensor | None,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    resets: Tensor | None,
    scale: float,
    changes: Tensor,
    inverse: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients, see `operator.define`; states are computed again rather than kept."""
    c = _prepare(q, k, v, log_decay, beta, resets, scale)
    N, _, C, _ = c.k.shape
    do_NMCV = torch.zeros_like(c.v) if do is None else _by_chunk(do, N, C, c.v.dtype)
    similar_NMCC, aimed_NMCC = c.k @ c.k.mT, c.q @ c.k.mT
    reads_NMCK = inverse @ (c.entry * c.k)
    leaving_NMCK = c.last * c.k

    state_MKV = _start(c, initial_state)
    states = state_MKV.new_empty(N, *state_MKV.shape)  # before each chunk
    for n in range(N):
        states[n] = state_MKV
        if n + 1 < N:
            state_MKV = torch.baddbmm(c.end[n] * state_MKV, leaving_NMCK[n].mT, changes[n])

    # Back through the chunks: dY, and dS before each of them.
    dy_NMCV = (aimed_NMCC * c.weight).mT @ do_NMCV
    entering_NMCK = c.entry * c.q
    dleaving_NMCK = torch.empty_like(c.k)
    dend_NM = c.end.new_zeros(c.end.shape[:2])
    if dfinal is None:
        dstate_MKV = torch.zeros_like(state_MKV)
    else:
        dstate_MKV = dfinal.reshape(state_MKV.shape)
    for n in reversed(range(N)):
        dy_NMCV[n].baddbmm_(leaving_NMCK[n], dstate_MKV)
        torch.bmm(changes[n], dstate_MKV.mT, out=dleaving_NMCK[n])
        dkept_MKV = c.end[n] * dstate_MKV
        dend_NM[n] = (dkept_MKV * states[n]).sum((-2, -1))
        dstate_MKV = dkept_MKV.baddbmm_(entering_NMCK[n].mT, do_NMCV[n])
        dstate_MKV.baddbmm_(reads_NMCK[n].mT, dy_NMCV[n], alpha=-1)

    # What every chunk does by itself, for all of them at once.
    dv_NMCV = inverse.mT @ dy_NMCV
    dq_NMCK = (c.entry * do_NMCV) @ states.mT
    dread_NMCK = (c.entry * dv_NMCV) @ states.mT  # times -1: gradient of k in (e * K) S_0
    dtotal_NMC = (c.q * dq_NMCK - c.k * dread_NMCK).sum(-1)  # gradient of e's logarithm
    dk_NMCK = torch.addcmul(-dread_NMCK, c.last, dleaving_NMCK)
    doverlap_NMCC = (dv_NMCV @ changes.mT).tril_(-1).neg_()
    dreach_NMCC = (do_NMCV @ changes.mT).tril_()
    dweight_NMCC = doverlap_NMCC * similar_NMCC + dreach_NMCC * aimed_NMCC
    dweight_NMCC[:, :, -1] += (c.k * dleaving_NMCK).sum(-1)
    doverlap_NMCC.mul_(c.weight)
    dreach_NMCC.mul_(c.weight)
    dq_NMCK += dreach_NMCC @ c.k
    dk_NMCK += dreach_NMCC.mT @ c.q
    dk_NMCK += (doverlap_NMCC + doverlap_NMCC.mT) @ c.k
    dbeta_NMC = (dweight_NMCC * c.decay).sum(-2)
    dlog_NMCC = dweight_NMCC.mul_(c.weight)
    dtotal_NMC += dlog_NMCC.sum(-1) - dlog_NMCC.sum(-2)
    dtotal_NMC[:, :, -1] += dend_NM
    dlog_decay_NMC = dtotal_NMC.flip(-1).cumsum(-1).flip(-1)

    gradients = [
        _by_token(gradient, like)
        for gradient, like in (
            (dq_NMCK.mul_(scale), q),
            (dk_NMCK, k),
            (dv_NMCV, v),
            (dlog_decay_NMC, log_decay),
            (dbeta_NMC, beta),
        )
    ]
    if initial_state is None:
        return *gradients, log_decay.new_empty(0)
    return *gradients, dstate_MKV.view(initial_state.shape)


def _inverse(overlap_NMCC: Tensor) -> Tensor:
    """The inverse of I + L, where L is below the diagonal of `overlap`; what is above is not read.

    In float64, since errors grow by repeated substitution: with beta = 2 and keys alike float32
    loses two digits more in 64 tokens.
    """
    wide = overlap_NMCC.double()
    eye = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device).expand_as(wide)
    inverse = torch.linalg.solve_triangular(wide, eye, upper=False, unitriangular=True)
    return inverse.to(overlap_NMCC.dtype)


def _start(c: _Tokens, initial_state: Tensor | None) -> Tensor:
    """A state, or zeros, as (M, K, V)."""
    if initial_state is None:
        return c.k.new_zeros(c.k.shape[1], c.k.shape[3], c.v.shape[3])
    return initial_state.reshape(-1, *initial_state.shape[2:])


def outputs_for(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    resets: Tensor | None,
    scale: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised (o, final state, Y, inverse of I + L), see `operator.define`."""
    rows, length, heads, keys = k.shape
    values = v.shape[-1]
    chunks, size = chunk_size(length, keys)
    if not save:
        chunks = 0
    return (
        v.new_empty(rows, length, heads, values),
        log_decay.new_empty(rows, heads, keys, values),
        log_decay.new_empty(chunks, rows * heads, size, values),
        log_decay.new_empty(chunks, rows * heads, size, size),
    )


scan = define("gated_delta_chunked", forward, backward, outputs_for)
