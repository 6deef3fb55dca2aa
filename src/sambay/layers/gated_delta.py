"""The Gated DeltaNet mixer (arXiv 2412.06464), with its norm behind the gate or before it.

Shape letters: B batch, T columns, D hidden, H heads, K key size, V value size of a head, E = H * V.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sambay.layers.context import BatchContext, SharedStates
from sambay.layers.norm import GatedRMSNorm
from sambay.layers.precision import Float32Parameters
from sambay.layers.projection import Linear, ResidualProjection, few_rows
from sambay.layers.roles import Role
from sambay.layers.slots import SlotLayer, SlotStep
from sambay.layers.state import RecurrentState
from sambay.ops.causal_conv import causal_conv, causal_conv_step
from sambay.ops.gated_delta import gated_delta, gated_delta_step, l2_normalise
from sambay.spec import LayerSpec, MemorySource, ModelConfig


class GatedDelta(Float32Parameters):
    """Delta rule with decay; beta up to 2, so that a state can also be reflected.

    The output o of the rule, heads side by side, is gated: out_proj(RMSNorm(o * silu(g_proj x)))
    with the norm over all heads together, or out_proj(RMSNorm(o) * silu(g_proj x)) with a norm
    within each head and one weight for all (`ModelConfig.recurrent_norm`). The published memory is
    what the gate multiplies: o, or its norm (arXiv 2507.06607, section 2 and appendix B).
    """

    roles: ClassVar = {
        "q_proj.weight": Role.MATRIX,
        "k_proj.weight": Role.MATRIX,
        "v_proj.weight": Role.MATRIX,
        "g_proj.weight": Role.MATRIX,
        "a_proj.weight": Role.MATRIX,
        "b_proj.weight": Role.MATRIX,
        "conv_weight": Role.VECTOR,
        "dt_bias": Role.SSM,
        "A_log": Role.SSM,
        "out_proj.weight": Role.MATRIX,
    }
    float32_parameters: ClassVar = ("A_log", "dt_bias")

    def __init__(self, config: ModelConfig, layer: LayerSpec) -> None:
        super().__init__()
        D, H, K, V = (
            config.hidden_size,
            config.recurrent_heads,
            config.d_state,
            config.recurrent_head_dim,
        )
        self.q_proj = Linear(D, H * K, bias=False)
        self.k_proj = Linear(D, H * K, bias=False)
        self.v_proj = Linear(D, H * V, bias=False)
        self.g_proj = Linear(D, H * V, bias=False)
        self.a_proj = Linear(D, H, bias=False)
        self.b_proj = Linear(D, H, bias=False)
        # Of the channels of q, k and v, in this order; the last weight is that of the same column.
        self.conv_weight = nn.Parameter(torch.empty(2 * H * K + H * V, config.d_conv))
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.A_log = nn.Parameter(torch.empty(H))
        self.publishes_memory = layer.publishes_memory is MemorySource.MAMBA
        before_gate = config.recurrent_norm.is_before_gate(publishes_memory=self.publishes_memory)
        size = V if before_gate else H * V
        self.norm = GatedRMSNorm(size, config.norm_eps, before_gate=before_gate)
        self.out_proj = ResidualProjection(H * V, D, bias=False)
        self.splits = (H * K, H * K, H * V)
        self.heads = H
        self.scale = K**-0.5

    def forward(
        self,
        x_BTD: Tensor,
        context: BatchContext,
        shared: SharedStates,
        state: RecurrentState | None,
    ) -> tuple[Tensor, SharedStates]:
        """(B, T, D) to (B, T or keep, D); advances `state` by T columns if there is one."""
        o_BTE = context.select(self._mix(x_BTD, context, state)).flatten(2)
        gated_BTE, memory_BTE = self._gated(o_BTE, self.g_proj(context.select(x_BTD)))
        if self.publishes_memory:
            shared = shared._replace(memory=memory_BTE)
        return self.out_proj(gated_BTE), shared

    def decode(
        self, x_BD: Tensor, step: SlotStep, shared: SharedStates, layer: SlotLayer
    ) -> tuple[Tensor, SharedStates]:
        """(B, D) to (B, D) for one token per slot, by which `layer.state` is advanced."""
        assert isinstance(layer.state, RecurrentState)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        u_BC = torch.cat([few_rows(proj, x_BD) for proj in projections], dim=-1)
        o_BHV = self._mix_one(u_BC, *self._rates(x_BD), layer.state)
        gated_BE, memory_BE = self._gated(o_BHV.flatten(1), few_rows(self.g_proj, x_BD))
        if self.publishes_memory:
            shared = shared._replace(memory=memory_BE)
        return few_rows(self.out_proj, gated_BE), shared

    def _gated(self, o: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """Readout (..., E) and gate to what is projected and what is published, (..., E) each."""
        # A norm before the gate sees one head at a time, a norm after it all of them.
        size = self.norm.weight.shape[0]
        outputs = self.norm(o.unflatten(-1, (-1, size)), gate.unflatten(-1, (-1, size)))
        return outputs[0].flatten(-2), outputs[1].flatten(-2)

    def _mix_one(
        self, u_BC: Tensor, log_decay_BH: Tensor, beta_BH: Tensor, state: RecurrentState
    ) -> Tensor:
        """One decode step, (B, H, V)."""
        no_bias = self.conv_weight.new_zeros(u_BC.shape[-1])
        u_BC = causal_conv_step(u_BC, self.conv_weight, no_bias, state_BCE=state.buffers["conv"])
        return gated_delta_step(
            *self._heads(u_BC),
            log_decay_BH,
            beta_BH,
            scale=self.scale,
            state_BHKV=state.buffers["ssm"],
        )

    def _mix(self, x_BTD: Tensor, context: BatchContext, state: RecurrentState | None) -> Tensor:
        """Convolution and delta rule over the columns; its output, (B, T, H, V)."""
        padding, resets = context.padding(x_BTD.device), context.resets()
        u_BTC = torch.cat((self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)), dim=-1)
        no_bias = self.conv_weight.new_zeros(u_BTC.shape[-1])
        log_decay_BTH, beta_BTH = self._rates(x_BTD)
        single = u_BTC.shape[1] == 1 and padding is None and not torch.is_grad_enabled()
        if state is not None and single:
            return self._mix_one(u_BTC[:, 0], log_decay_BTH[:, 0], beta_BTH[:, 0], state)[:, None]
        if padding is not None:
            # As if the row started after it: keys and values stay zero, and so does the state.
            u_BTC = u_BTC.masked_fill(padding, 0)
        earlier_BWC = None if state is None else state.buffers["conv"].to(u_BTC.dtype)
        convolved_BTC = causal_conv(
            u_BTC, self.conv_weight, no_bias, initial_state_BCE=earlier_BWC, resets_BT=resets
        )
        o_BTHV, last_BHKV = gated_delta(
            *self._heads(convolved_BTC),
            log_decay_BTH,
            beta_BTH,
            scale=self.scale,
            initial_state_BHKV=None if state is None else state.buffers["ssm"],
            resets_BT=resets,
        )
        if state is not None and earlier_BWC is not None:
            state.buffers["ssm"].copy_(last_BHKV)
            tail_BWC = torch.cat((earlier_BWC, u_BTC[:, -earlier_BWC.shape[1] :]), dim=1)
            state.buffers["conv"].copy_(tail_BWC[:, tail_BWC.shape[1] - earlier_BWC.shape[1] :])
        return o_BTHV

    def _rates(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """The logarithm of each head's decay, and beta, (B, T, H); float32 or more."""
        compute = self.A_log.dtype
        dt_BTH = F.softplus(self.a_proj(x_BTD).to(compute) + self.dt_bias)
        beta_BTH = 2 * torch.sigmoid(self.b_proj(x_BTD).to(compute))
        return -torch.exp(self.A_log) * dt_BTH, beta_BTH

    def _heads(self, channels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (..., H, K or V) of convolved channels, q and k of unit length."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in channels.split(self.splits, -1))
        return l2_normalise(q), l2_normalise(k), v
