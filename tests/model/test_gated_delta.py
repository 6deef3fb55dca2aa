"""The Gated DeltaNet mixer: its memory, its norm, and that chunks and padding change nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sambay.layers.context import BatchContext, SharedStates
from sambay.layers.gated_delta import GatedDelta
from sambay.layers.state import RecurrentState
from sambay.ops.causal_conv import causal_conv
from sambay.ops.gated_delta import gated_delta
from sambay.spec import LayerKind, LayerSpec, MemorySource, RecurrentNorm
from sambay.spec.recurrent import state_shape
from tests.tiny import tiny_config

HIDDEN, KEYS, VALUES = 36, 3, 5
CPU = torch.device("cpu")
CONFIG = tiny_config("s-gdny", d_state=KEYS, hidden_size=HIDDEN, recurrent_head_dim=VALUES)
HEADS = CONFIG.recurrent_heads


def make_mixer(
    norm: RecurrentNorm = RecurrentNorm.AFTER_GATE,
    *,
    publishes: bool = True,
    dtype: torch.dtype = torch.float64,
) -> GatedDelta:
    source = MemorySource.MAMBA if publishes else None
    layer = LayerSpec(0, LayerKind.MAMBA, publishes_memory=source)
    mixer = GatedDelta(CONFIG.replace(recurrent_norm=norm), layer).to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        mixer.norm.weight.add_(1)
        mixer.A_log.sub_(2)  # so that what is far away still counts
    return mixer


def make_state(rows: int) -> RecurrentState:
    state = RecurrentState(rows, state_shape(CONFIG), CPU)
    state.buffers = {name: buffer.double() for name, buffer in state.buffers.items()}
    return state


def apply(
    mixer: GatedDelta, x: torch.Tensor, context: BatchContext, state: RecurrentState | None = None
) -> torch.Tensor:
    """Output and memory side by side."""
    y, shared = mixer(x, context, SharedStates(), state)
    return y if shared.memory is None else torch.cat([y, shared.memory], -1)


def rms_norm(x: torch.Tensor, mixer: GatedDelta) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight


@pytest.mark.parametrize("publishes", [False, True], ids=["inner layer", "publisher"])
@pytest.mark.parametrize("norm", RecurrentNorm)
def test_output_and_memory_are_what_their_definition_says(norm, publishes):
    mixer = make_mixer(norm, publishes=publishes)
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    out, shared = mixer(x, BatchContext(0, 9), SharedStates(), None)

    keys, values = HEADS * KEYS, HEADS * VALUES
    assert mixer.conv_weight.shape == (2 * keys + values, CONFIG.d_conv)
    parts = []
    weights = mixer.conv_weight.split([keys, keys, values])
    for projection, weight in zip((mixer.q_proj, mixer.k_proj, mixer.v_proj), weights, strict=True):
        u = x @ projection.weight.t()
        bias = torch.zeros(len(weight), dtype=torch.float64)
        parts.append(causal_conv(u, weight, bias, backend="reference").unflatten(-1, (HEADS, -1)))
    q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in parts[:2])
    o, _ = gated_delta(
        q,
        k,
        parts[2],
        -mixer.A_log.exp() * F.softplus(x @ mixer.a_proj.weight.t() + mixer.dt_bias),
        2 / (1 + torch.exp(-x @ mixer.b_proj.weight.t())),
        scale=1 / KEYS**0.5,
        backend="reference",
    )
    gate = F.silu(x @ mixer.g_proj.weight.t())
    before = norm == "before_gate" or (norm == "before_gate_in_publisher" and publishes)
    assert mixer.norm.weight.shape == ((VALUES,) if before else (values,))
    memory = (rms_norm(o, mixer) if before else o).reshape(2, 9, values)
    gated = memory * gate
    expected = (gated if before else rms_norm(gated, mixer)) @ mixer.out_proj.weight.t()
    torch.testing.assert_close(out, expected)
    if publishes:
        torch.testing.assert_close(shared.memory, memory)
    else:
        assert shared.memory is None


def test_every_parameter_gets_a_gradient_and_has_a_role():
    mixer = make_mixer()
    apply(
        mixer, torch.randn(2, 9, HIDDEN, dtype=torch.float64), BatchContext(0, 9)
    ).sum().backward()
    own = {name for name, _ in mixer.named_parameters()}
    assert own == {*mixer.roles, "norm.weight"}
    assert all(p.grad is not None and p.grad.any() for p in mixer.parameters())


def test_no_output_depends_on_a_later_input():
    mixer = make_mixer()
    x = torch.randn(1, 70, HIDDEN, dtype=torch.float64, requires_grad=True)
    y = apply(mixer, x, BatchContext(0, 70))
    (grad,) = torch.autograd.grad(y[:, 65].square().sum(), x)
    assert not grad[:, 66:].any()
    assert grad[:, :66].any(-1).all(), "and on every earlier one"


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[1] * 9, [4, 5], [2, 1, 5, 1]], ids=str)
def test_chunks_and_steps_equal_the_whole(cuts):
    mixer, state = make_mixer(), make_state(2)
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    offset, parts = 0, []
    for part in x.split(cuts, 1):
        context = BatchContext(offset, part.shape[1])
        parts.append(apply(mixer, part, context, state))
        offset += part.shape[1]
    whole = apply(mixer, x, BatchContext(0, 9))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_left_padding_changes_no_row():
    mixer, state = make_mixer(), make_state(2)
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    starts = torch.tensor([0, 4])
    chunks = []
    for offset, length in ((0, 3), (3, 5), (8, 1)):
        context = BatchContext(offset, length, starts=starts, max_start=4)
        chunks.append(apply(mixer, x[:, offset : offset + length], context, state))
    padded = torch.cat(chunks, 1)
    for row, start in enumerate(starts.tolist()):
        alone = apply(mixer, x[row : row + 1, start:], BatchContext(0, 9 - start))
        torch.testing.assert_close(padded[row : row + 1, start:], alone, rtol=1e-10, atol=1e-12)


def test_packed_documents_do_not_see_each_other():
    mixer = make_mixer()
    x = torch.randn(1, 12, HIDDEN, dtype=torch.float64)
    segments = torch.tensor([[0] * 5 + [1] * 1 + [2] * 6], dtype=torch.int32)
    packed = apply(mixer, x, BatchContext(0, 12, segments=segments))
    parts = x.split([5, 1, 6], 1)
    alone = [apply(mixer, part, BatchContext(0, part.shape[1])) for part in parts]
    torch.testing.assert_close(packed, torch.cat(alone, 1))


@torch.no_grad()
def test_only_the_wanted_columns_come_back_while_the_state_sees_all():
    mixer, state, whole_state = make_mixer(), make_state(2), make_state(2)
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    last = apply(mixer, x, BatchContext(0, 9, keep=1), state)
    whole = apply(mixer, x, BatchContext(0, 9), whole_state)
    torch.testing.assert_close(last, whole[:, -1:])
    for name, buffer in state.buffers.items():
        torch.testing.assert_close(buffer, whole_state.buffers[name])


@torch.no_grad()
def test_bfloat16_keeps_the_rates_of_decay_in_float32_and_stays_close():
    mixer = make_mixer(dtype=torch.float32)
    x = torch.randn(2, 20, HIDDEN)
    expected = apply(mixer, x, BatchContext(0, 20))
    actual = apply(mixer.bfloat16(), x.bfloat16(), BatchContext(0, 20))
    kept = {name for name, p in mixer.named_parameters() if p.dtype == torch.float32}
    assert kept == {"A_log", "dt_bias"}
    assert actual.dtype == torch.bfloat16
    # Short keys before their normalisation lose more than others, so single numbers may be off.
    assert (actual.float() - expected).norm() < 0.06 * expected.norm()
