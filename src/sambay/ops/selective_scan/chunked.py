"""The selective scan in plain torch, for any device and without a compiler.

The sequence is cut into chunks. Within one, everything but the recurrence itself is computed for
all tokens at once; the recurrence is one fused multiply-add per token, or, on an accelerator, two
levels of short recurrences. Nothing is divided by a product of decays, so nothing overflows. Only
the state before each chunk is kept for the backward, which is written by hand.

Inside, time comes first and channels last: tensors are (C, B, N, E) for a chunk of C tokens, so
that every sum over states adds whole rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from sambay.ops.selective_scan.operator import define, gradients_for, outputs_for

CHUNK = 32  # bounds memory: a chunk needs about six tensors (CHUNK, B, N, E)


class _Chunk(NamedTuple):
    """The inputs of some tokens in computing precision, and the decay of the state at each."""

    z: Tensor  # (C, B, E): delta + delta_bias
    dt: Tensor  # (C, B, E)
    x: Tensor  # (C, B, E)
    B: Tensor  # (C, B, N)
    C: Tensor  # (C, B, N)
    decay: Tensor  # (C, B, N, E)


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
    decay_CBNE = (dt_CBE[:, :, None] * A.t()).exp_()
    if resets is not None:
        decay_CBNE.masked_fill_(resets[:, tokens].t()[..., None, None], 0.0)
    return _Chunk(z_CBE, dt_CBE, x_CBE, B_CBN, C_CBN, decay_CBNE)


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


def reverse_recurrence(decay: Tensor, inputs: Tensor, state: Tensor, lanes: int = 1) -> Tensor:
    """All g_t = inputs_t + decay_{t+1} * g_{t+1}, from `state` behind the last, as `recurrence`.

    This is how dL/ds runs back through the states. The first decay has no part in it.
    """
    if lanes == 1:
        later = inputs[-1].add_(state)
        steps = list(zip(inputs.unbind()[:-1], decay.unbind()[1:], strict=True))
        for g, a in reversed(steps):
            later = g.addcmul_(a, later)
        return inputs
    after = torch.cat([torch.ones_like(decay[:1]), decay.flip(0)[:-1]])
    return recurrence(after, inputs.flip(0), state, lanes).flip(0)


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
    state_BNE = _start(x, A, initial_state)
    for index, tokens in enumerate(_chunks(x.shape[1])):
        if save and index > 0:
            saved[:, index - 1] = state_BNE
        k = _chunk(tokens, x, delta, A, B, C, delta_bias, resets)
        inputs_CBNE = (k.dt * k.x)[:, :, None] * k.B[..., None]
        states_CBNE = recurrence(k.decay, inputs_CBNE, state_BNE, _lanes(inputs_CBNE))
        state_BNE = states_CBNE[-1]
        y_CBE = _over_states(k.C, states_CBNE).addcmul_(k.x, D)
        y[:, tokens] = y_CBE.transpose(0, 1).to(y.dtype)
    final_state.copy_(state_BNE.transpose(1, 2))
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
    first_BNE, dstate_BNE = _start(x, A, initial_state), _start(x, A, dfinal)
    for index, tokens in reversed(list(enumerate(_chunks(x.shape[1])))):
        k = _chunk(tokens, x, delta, A, B, C, delta_bias, resets)
        before_BNE = first_BNE if index == 0 else saved[:, index - 1]
        dy_CBE = dy[:, tokens].transpose(0, 1).to(A.dtype)
        u_CBE = k.dt * k.x
        inputs_CBNE = u_CBE[:, :, None] * k.B[..., None]
        lanes = _lanes(inputs_CBNE)
        states_CBNE = recurrence(k.decay, inputs_CBNE, before_BNE, lanes)
        dC[:, tokens] = _over_channels(dy_CBE, states_CBNE).transpose(0, 1).to(dC.dtype)

        outputs_CBNE = dy_CBE[:, :, None] * k.C[..., None]
        g_CBNE = reverse_recurrence(k.decay, outputs_CBNE, dstate_BNE, lanes)  # dL/ds
        dB[:, tokens] = _over_channels(u_CBE, g_CBNE).transpose(0, 1).to(dB.dtype)
        du_CBE = _over_states(k.B, g_CBNE)
        g_CBNE.mul_(k.decay)
        dstate_BNE = g_CBNE[0].clone()
        # From here on g is dL/d(dt A), the gradient of the decay's exponent.
        g_CBNE[0].mul_(before_BNE)
        g_CBNE[1:].mul_(states_CBNE[:-1])
        scratch_CBNE = torch.mul(g_CBNE, k.dt[:, :, None], out=states_CBNE)
        dA += scratch_CBNE.sum((0, 1)).t()
        ddt_CBE = torch.mul(g_CBNE, A.t(), out=scratch_CBNE).sum(2).addcmul_(du_CBE, k.x)
        # exp(logsigmoid) is the slope of softplus without cancellation.
        dz_CBE = ddt_CBE.mul_(logsigmoid(k.z).exp_())
        dbias += dz_CBE.sum((0, 1))
        dD += (dy_CBE * k.x).sum((0, 1))
        ddelta[:, tokens] = dz_CBE.transpose(0, 1).to(ddelta.dtype)
        dx_CBE = (du_CBE * k.dt).addcmul_(dy_CBE, D)
        dx[:, tokens] = dx_CBE.transpose(0, 1).to(dx.dtype)
    if dinitial.numel():
        dinitial.copy_(dstate_BNE.transpose(1, 2))
    return gradients


def _start(x: Tensor, A: Tensor, state_BEN: Tensor | None) -> Tensor:
    """A state, or zeros, as (B, N, E)."""
    if state_BEN is None:
        return A.new_zeros(x.shape[0], A.shape[1], A.shape[0])
    return state_BEN.transpose(1, 2).contiguous()


def _over_states(weights_CBN: Tensor, values_CBNE: Tensor) -> Tensor:
    """The weighted sum over states, (C, B, E)."""
    return torch.matmul(weights_CBN[:, :, None], values_CBNE)[:, :, 0]


def _over_channels(weights_CBE: Tensor, values_CBNE: Tensor) -> Tensor:
    """The weighted sum over channels, (C, B, N)."""
    return torch.matmul(values_CBNE, weights_CBE[..., None])[..., 0]


scan = define("selective_scan_chunked", forward, backward, CHUNK)
