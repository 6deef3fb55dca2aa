"""The Mamba-2 mixer: its memory and norm, and that chunks, steps and padding change nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sambay.layers.context import BatchContext, SharedStates
from sambay.layers.mamba2 import Mamba2
from sambay.layers.norm import GatedRMSNorm
from sambay.layers.state import RecurrentState
from sambay.ops.causal_conv import causal_conv
from sambay.ops.state_space_dual import state_space_dual
from sambay.spec import LayerKind, LayerSpec, MemorySource, RecurrentNorm
from sambay.spec.recurrent import state_shape
from tests.tiny import tiny_config

HIDDEN, HEADS, CHANNELS, STATES = 36, 3, 5, 4
INNER = HEADS * CHANNELS
CPU = torch.device("cpu")
CONFIG = tiny_config("sambay-2", d_state=STATES, hidden_size=HIDDEN, recurrent_head_dim=CHANNELS)


def make_mixer(
    norm: RecurrentNorm = RecurrentNorm.AFTER_GATE,
    *,
    publishes: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Mamba2:
    source = MemorySource.MAMBA if publishes else None
    mixer = Mamba2(
        CONFIG.replace(recurrent_norm=norm),
        LayerSpec(0, LayerKind.MAMBA, publishes_memory=source),
    ).to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        mixer.norm.weight.add_(1)
    return mixer


def make_state(rows: int) -> RecurrentState:
    state = RecurrentState(rows, state_shape(CONFIG), CPU)
    state.buffers = {name: buffer.double() for name, buffer in state.buffers.items()}
    return state


def apply(
    mixer: Mamba2, x: torch.Tensor, context: BatchContext, state: RecurrentState | None = None
) -> torch.Tensor:
    """Output and memory side by side."""
    y, shared = mixer(x, context, SharedStates(), state)
    return y if shared.memory is None else torch.cat([y, shared.memory], -1)


def rms_norm(x: torch.Tensor, mixer: Mamba2) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight


@pytest.mark.parametrize("publishes", [False, True], ids=["inner layer", "publisher"])
@pytest.mark.parametrize("norm", RecurrentNorm)
def test_output_and_memory_are_what_their_definition_says(norm, publishes):
    mixer = make_mixer(norm, publishes=publishes)
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    out, shared = mixer(x, BatchContext(0, 9), SharedStates(), None)

    rows = mixer.in_proj.weight.split([INNER, INNER, STATES, STATES, HEADS])
    z, inner, B, C, dt = (x @ part.t() for part in rows)
    convolved = causal_conv(
        torch.cat([inner, B, C], -1), mixer.conv_weight, mixer.conv_bias, backend="reference"
    )
    inner, B, C = convolved.split([INNER, STATES, STATES], dim=-1)
    y, _ = state_space_dual(
        inner.reshape(2, 9, HEADS, CHANNELS),
        dt,
        -mixer.A_log.exp(),
        B,
        C,
        mixer.D,
        delta_bias_H=mixer.dt_bias,
        backend="reference",
    )
    y = y.reshape(2, 9, INNER)
    before = norm == "before_gate" or (norm == "before_gate_in_publisher" and publishes)
    memory = rms_norm(y, mixer) if before else y
    gated = memory * F.silu(z)
    torch.testing.assert_close(
        out, (gated if before else rms_norm(gated, mixer)) @ out_weight(mixer)
    )
    if publishes:
        torch.testing.assert_close(shared.memory, memory)
    else:
        assert shared.memory is None


def out_weight(mixer: Mamba2) -> torch.Tensor:
    return mixer.out_proj.weight.t()


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
    assert kept == {"A_log", "D", "dt_bias"}
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("before_gate", [False, True])
def test_a_gated_norm_keeps_the_memory_in_its_own_precision(before_gate):
    norm = GatedRMSNorm(8, 1e-5, before_gate=before_gate)  # float32 weights, as under autocast
    y, z = torch.randn(2, 3, 8).bfloat16(), torch.randn(2, 3, 8).bfloat16()
    gated, memory = norm(y, z)
    assert memory.dtype == torch.bfloat16
    size = (memory if before_gate else gated).float().square().mean(-1)
    torch.testing.assert_close(size, torch.ones(2, 3), rtol=2e-2, atol=0)
    assert torch.equal(memory, y) is not before_gate
