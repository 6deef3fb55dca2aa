"""The Mamba-2 mixer (arXiv 2405.21060); the last one of the self-decoder publishes the memory.

Shape letters: B batch, T columns, D hidden, E inner, H heads, P channels per head (E = H * P),
N state, X = E + 2N the channels of the convolution.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from sambay.layers.context import BatchContext, SharedStates
from sambay.layers.norm import GatedRMSNorm
from sambay.layers.precision import Float32Parameters
from sambay.layers.projection import Linear, ResidualProjection, few_rows
from sambay.layers.roles import Role
from sambay.layers.slots import SlotLayer, SlotStep
from sambay.layers.state import RecurrentState
from sambay.ops.causal_conv import causal_conv, causal_conv_step
from sambay.ops.state_space_dual import state_space_dual, state_space_dual_step
from sambay.spec import LayerSpec, MemorySource, ModelConfig


class Mamba2(Float32Parameters):
    """State space mixer with one decay per head, and an RMSNorm beside its output gate.

    The published memory is what the gate multiplies: the scan output with the D skip, and normed
    where the configuration puts the norm before the gate (arXiv 2507.06607, section 2 and table 9).
    """

    roles: ClassVar = {
        "in_proj.weight": Role.MATRIX,
        "conv_weight": Role.VECTOR,
        "conv_bias": Role.VECTOR,
        "dt_bias": Role.SSM,
        "A_log": Role.SSM,
        "D": Role.SSM,
        "out_proj.weight": Role.MATRIX,
    }
    float32_parameters: ClassVar = ("A_log", "D", "dt_bias")

    def __init__(self, config: ModelConfig, layer: LayerSpec) -> None:
        super().__init__()
        D, E, N, H = config.hidden_size, config.d_inner, config.d_state, config.recurrent_heads
        self.splits = (E, E + 2 * N, H)  # gate; x, B and C; time step
        self.scan_splits = (E, N, N)
        self.head_dim = config.recurrent_head_dim
        self.publishes_memory = layer.publishes_memory is MemorySource.MAMBA
        self.in_proj = Linear(D, sum(self.splits), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(E + 2 * N, config.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(E + 2 * N))
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.A_log = nn.Parameter(torch.empty(H))
        self.D = nn.Parameter(torch.empty(H))
        before_gate = config.recurrent_norm.is_before_gate(publishes_memory=self.publishes_memory)
        self.norm = GatedRMSNorm(E, config.norm_eps, before_gate=before_gate)
        self.out_proj = ResidualProjection(E, D, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        context: BatchContext,
        shared: SharedStates,
        state: RecurrentState | None,
    ) -> tuple[Tensor, SharedStates]:
        """(B, T, D) to (B, T or keep, D); advances `state` by T columns if there is one."""
        z_BTE, u_BTX, delta_BTH = self.in_proj(x_BTD).split(self.splits, dim=-1)
        y_BTE = self._mix(u_BTX, delta_BTH, context, state)
        gated_BTE, memory_BTE = self.norm(context.select(y_BTE), context.select(z_BTE))
        if self.publishes_memory:
            shared = shared._replace(memory=memory_BTE)
        return self.out_proj(gated_BTE), shared

    def decode(
        self, x_BD: Tensor, step: SlotStep, shared: SharedStates, layer: SlotLayer
    ) -> tuple[Tensor, SharedStates]:
        """(B, D) to (B, D) for one token per slot, by which `layer.state` is advanced."""
        assert isinstance(layer.state, RecurrentState)
        z_BE, u_BX, delta_BH = few_rows(self.in_proj, x_BD).split(self.splits, dim=-1)
        gated_BE, memory_BE = self.norm(self._mix_one(u_BX, delta_BH, layer.state), z_BE)
        if self.publishes_memory:
            shared = shared._replace(memory=memory_BE)
        return few_rows(self.out_proj, gated_BE), shared

    def _mix(
        self, u_BTX: Tensor, delta_BTH: Tensor, context: BatchContext, state: RecurrentState | None
    ) -> Tensor:
        """Convolution and scan over the columns; the scan output with the D skip, (B, T, E)."""
        padding, resets = context.padding(u_BTX.device), context.resets()
        single = u_BTX.shape[1] == 1 and padding is None and not torch.is_grad_enabled()
        if state is not None and single:
            return self._mix_one(u_BTX[:, 0], delta_BTH[:, 0], state)[:, None]
        if padding is not None:
            u_BTX = u_BTX.masked_fill(padding, 0)  # as if the row started after it
        conv_state = None if state is None else state.buffers["conv"].to(u_BTX.dtype)
        conv_BTX = causal_conv(
            u_BTX,
            self.conv_weight,
            self.conv_bias,
            initial_state_BCE=conv_state,
            resets_BT=resets,
        )
        if padding is not None:
            conv_BTX = conv_BTX.masked_fill(padding, 0)  # the zero state stays zero
        x_BTE, B_BTN, C_BTN = conv_BTX.split(self.scan_splits, dim=-1)
        y_BTHP, last_BHPN = state_space_dual(
            self._in_heads(x_BTE),
            delta_BTH,
            -torch.exp(self.A_log),
            B_BTN,
            C_BTN,
            self.D,
            delta_bias_H=self.dt_bias,
            initial_state_BHPN=None if state is None else state.buffers["ssm"],
            resets_BT=resets,
        )
        if state is not None and conv_state is not None:
            state.buffers["ssm"].copy_(last_BHPN)
            tail = torch.cat((conv_state, u_BTX[:, -conv_state.shape[1] :]), dim=1)
            state.buffers["conv"].copy_(tail[:, tail.shape[1] - conv_state.shape[1] :])
        return y_BTHP.flatten(-2)

    def _mix_one(self, u_BX: Tensor, delta_BH: Tensor, state: RecurrentState) -> Tensor:
        """One decode step, (B, E)."""
        conv_BX = causal_conv_step(
            u_BX, self.conv_weight, self.conv_bias, state_BCE=state.buffers["conv"]
        )
        x_BE, B_BN, C_BN = conv_BX.split(self.scan_splits, dim=-1)
        y_BHP = state_space_dual_step(
            self._in_heads(x_BE),
            delta_BH,
            -torch.exp(self.A_log),
            B_BN,
            C_BN,
            self.D,
            delta_bias_H=self.dt_bias,
            state_BHPN=state.buffers["ssm"],
        )
        return y_BHP.flatten(-2)

    def _in_heads(self, x: Tensor) -> Tensor:
        """(..., E) to (..., H, P)."""
        return x.unflatten(-1, (-1, self.head_dim))
