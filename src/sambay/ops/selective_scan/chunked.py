"""The selective scan in plain torch, for any device and without a compiler.

The sequence is cut into chunks. Within one, everything but the recurrence itself is computed for
all tokens at once; the recurrence is one fused multiply-add per token, or, on an accelerator, two
levels of short recurrences. Nothing is divided by a product of decays, so nothing overflows. Only
the state before each chunk is kept for the backward, which is written by hand.

Inside, time comes first: tensors are (C, B, E, N) for a chunk of C tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from sambay.ops.selective_scan.operator import define, gradients_for, outputs_for

CHUNK = 64  # bounds memory: a chunk needs about six tensors (CHUNK, B, E, N)


class _Chunk(NamedTuple):
    """The inputs of some tokens in computing precision, and the decay of the state at each."""

    z: Tensor  # (C, B, E): delta + delta_bias
    dt: Tensor  # (C, B, E)
    x: Tensor  # (C, B, E)
    B: Tensor  # (C, B, N)
    C: Tensor  # (C, B, N)
    decay: Tensor  # (C, B, E, N)


def _chunk(
    tokens: slice,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    delta_bias: Tensor,
    resets: Tensor | None,
) -> _Chunk:
    x_CBE, delta_CBE, B_CBN, C_CBN = (
        tensor[:, tokens].transpose(0, 1).to(A.dtype) for tensor in (x, delta, B, C)
    )
    z_CBE = delta_CBE + delta_bias
    dt_CBE = softplus(z_CBE)
    decay_CBEN = (dt_CBE[..., None] * A).exp_()
    if resets is not None:
        decay_CBEN.masked_fill_(resets[:, tokens].t()[..., None, None], 0.0)
    return _Chunk(z_CBE, dt_CBE, x_CBE, B_CBN, C_CBN, decay_CBEN)


def recurrence(decay: Tensor, inputs: Tensor, state: Tensor, lanes: int = 1) -> Tensor:
    """All states s_t = decay_t * s_{t-1} + inputs_t, from `state`, written over `inputs`.

    decay and inputs are (C, ...). With several lanes the tokens are cut into that many runs, which
    advance side by side as if each began at zero; a second pass adds what came from before a run.
    """
    length = decay.shape[0]
    if lanes == 1:
        for a, s in zip(decay.unbind(), inputs.unbind(), strict=True):
            state = s.addcmul_(a, state)
        return inputs
    assert length % lanes == 0, (length, lanes)
    runs = inputs.unflatten(0, (lanes, length // lanes))
    reached = decay.unflatten(0, runs.shape[:2]).clone()  # decay since the start of the run
    for t in range(1, runs.shape[1]):
        runs[:, t].addcmul_(reached[:, t], runs[:, t - 1])
        reached[:, t].mul_(reached[:, t - 1])
    for run, decays in zip(runs.unbind(), reached.unbind(), strict=True):
        state = run.addcmul_(decays, state)[-1]
    return inputs


def _lanes(tensor: Tensor) -> int:
    """Accelerators wait for the launch of every small step, so they get fewer, larger ones."""
    if tensor.device.type == "cpu":
        return 1
    return max(lanes for lanes in range(1, math.isqrt(len(tensor)) + 1) if len(tensor) % lanes == 0)


def _chunks(length: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK))


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
    y, final_state, saved = outputs_for(x, A, CHUNK, save)
    state = torch.zeros_like(final_state) if initial_state is None else initial_state
    for index, tokens in enumerate(_chunks(x.shape[1])):
        if save and index > 0:
            saved[:, index - 1] = state.transpose(1, 2)
        k = _chunk(tokens, x, delta, A, B, C, delta_bias, resets)
        inputs_CBEN = (k.dt * k.x)[..., None] * k.B[:, :, None, :]
        states_CBEN = recurrence(k.decay, inputs_CBEN, state, _lanes(inputs_CBEN))
        state = states_CBEN[-1]
        y_CBE = torch.matmul(states_CBEN, k.C[..., None])[..., 0]
        y[:, tokens] = y_CBE.addcmul_(k.x, D).transpose(0, 1).to(y.dtype)
    final_state.copy_(state)
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
    gradients = gradients_for(x, A, B, initial_state)
    dx, ddelta, dA, dB, dC, dD, dbias, dinitial = gradients
    for total in (dA, dD, dbias):
        total.zero_()
    rows, channels, states = x.shape[0], *A.shape
    if initial_state is None:
        initial_state = A.new_zeros(rows, channels, states)
    dstate = A.new_zeros(rows, channels, states) if dfinal is None else dfinal
    for index, tokens in reversed(list(enumerate(_chunks(x.shape[1])))):
        k = _chunk(tokens, x, delta, A, B, C, delta_bias, resets)
        state = initial_state if index == 0 else saved[:, index - 1].transpose(1, 2)
        dy_CBE = dy[:, tokens].transpose(0, 1).to(A.dtype)
        u_CBE = k.dt * k.x
        inputs_CBEN = u_CBE[..., None] * k.B[:, :, None, :]
        lanes = _lanes(inputs_CBEN)
        states_CBEN = recurrence(k.decay, inputs_CBEN, state, lanes)
        dC[:, tokens] = _over_channels(dy_CBE, states_CBEN).to(dC.dtype)

        # dL/ds obeys the same recurrence backwards, each step with the decay of the token after it.
        after_CBEN = torch.cat([torch.ones_like(k.decay[:1]), k.decay.flip(0)[:-1]])
        outer_CBEN = (dy_CBE[..., None] * k.C[:, :, None, :]).flip(0)
        g_CBEN = recurrence(after_CBEN, outer_CBEN, dstate, lanes).flip(0)
        dB[:, tokens] = _over_channels(u_CBE, g_CBEN).to(dB.dtype)
        du_CBE = torch.matmul(g_CBEN, k.B[..., None])[..., 0]
        g_CBEN.mul_(k.decay)
        dstate = g_CBEN[0].clone()
        # From here on g is dL/d(dt A), the exponent of the decay.
        g_CBEN[0].mul_(state)
        g_CBEN[1:].mul_(states_CBEN[:-1])
        dA += torch.einsum("cben,cbe->en", g_CBEN, k.dt)
        ddt_CBE = (g_CBEN * A).sum(-1).addcmul_(du_CBE, k.x)
        # exp(logsigmoid) is the slope of softplus without cancellation.
        dz_CBE = ddt_CBE.mul_(logsigmoid(k.z).exp_())
        dbias += dz_CBE.sum((0, 1))
        dD += (dy_CBE * k.x).sum((0, 1))
        ddelta[:, tokens] = dz_CBE.transpose(0, 1).to(ddelta.dtype)
        dx_CBE = (du_CBE * k.dt).addcmul_(dy_CBE, D)
        dx[:, tokens] = dx_CBE.transpose(0, 1).to(dx.dtype)
    if dinitial.numel():
        dinitial.copy_(dstate)
    return gradients


def _over_channels(weights_CBE: Tensor, values_CBEN: Tensor) -> Tensor:
    """The sum over channels, (B, C, N)."""
    return torch.matmul(weights_CBE[:, :, None, :], values_CBEN)[:, :, 0].transpose(0, 1)


scan = define("selective_scan_chunked", forward, backward, CHUNK)
