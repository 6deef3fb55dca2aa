"""The Mamba-1 mixer (arXiv 2312.00752); the last one of the self-decoder publishes the memory.

Shape letters: B batch, T columns, D hidden, E inner, N state, R rank of the time step.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from sambay.layers.context import BatchContext, SharedStates
from sambay.layers.own_part import own_part
from sambay.layers.precision import Float32Parameters
from sambay.layers.projection import Linear, ResidualProjection, few_rows, is_plain
from sambay.layers.roles import Role
from sambay.layers.slots import SlotLayer, SlotStep
from sambay.layers.state import RecurrentState
from sambay.ops.causal_conv import causal_conv, causal_conv_step
from sambay.ops.decode import gate_rows, mamba_step
from sambay.ops.gate import gated_product
from sambay.ops.selective_scan import selective_scan, selective_scan_step
from sambay.spec import LayerSpec, MemorySource, ModelConfig


class Mamba(Float32Parameters):
    """Selective state space mixer without inner norms.

    The published memory is the scan output with the D skip and before the output gate
    (arXiv 2507.06607, section 2).
    """

    roles: ClassVar = {
        "in_proj.weight": Role.MATRIX,
        "conv_weight": Role.VECTOR,
        "conv_bias": Role.VECTOR,
        "x_proj.weight": Role.MATRIX,
        "dt_proj.weight": Role.MATRIX,
        "dt_bias": Role.SSM,
        "A_log": Role.SSM,
        "D": Role.SSM,
        "out_proj.weight": Role.MATRIX,
    }
    float32_parameters: ClassVar = ("A_log", "D", "dt_bias")
    halves: ClassVar = ("in_proj.weight",)

    def __init__(self, config: ModelConfig, layer: LayerSpec) -> None:
        super().__init__()
        D, E, N, R = config.hidden_size, config.d_inner, config.d_state, config.dt_rank
        self.in_proj = Linear(D, 2 * E, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(E, config.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(E))
        self.x_proj = Linear(E, R + 2 * N, bias=False)
        self.dt_proj = Linear(R, E, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(E))
        self.A_log = nn.Parameter(torch.empty(E, N))
        self.D = nn.Parameter(torch.empty(E))
        self.out_proj = ResidualProjection(E, D, bias=False)
        self.splits = (R, N, N)
        self.publishes_memory = layer.publishes_memory is MemorySource.MAMBA

    def forward(
        self,
        x_BTD: Tensor,
        context: BatchContext,
        shared: SharedStates,
        state: RecurrentState | None,
    ) -> tuple[Tensor, SharedStates]:
        """(B, T, D) to (B, T or keep, D); advances `state` by T columns if there is one."""
        u_BTE, z_BTE = self.in_proj(x_BTD).chunk(2, dim=-1)
        y_BTE = self._mix(u_BTE, context, state)
        y_BTE, z_BTE = context.select(y_BTE), context.select(z_BTE)
        if self.publishes_memory:
            shared = shared._replace(memory=y_BTE)
        return self.out_proj(gated_product(z_BTE, y_BTE)), shared

    def decode(
        self, x_BD: Tensor, step: SlotStep, shared: SharedStates, layer: SlotLayer
    ) -> tuple[Tensor, SharedStates]:
        """(B, D) to (B, D) for one token per slot, by which `layer.state` is advanced."""
        assert isinstance(layer.state, RecurrentState)
        u_BE, z_BE = few_rows(self.in_proj, x_BD).chunk(2, dim=-1)
        y_BE = self._mix_slots(u_BE, layer.state)
        if self.publishes_memory:
            shared = shared._replace(memory=y_BE)
        return few_rows(self.out_proj, gate_rows(z_BE, y_BE)), shared

    def _mix_slots(self, u_BE: Tensor, state: RecurrentState) -> Tensor:
        if not (is_plain(self.x_proj) and is_plain(self.dt_proj)):
            return self._mix_one(u_BE, state)
        return mamba_step(
            u_BE,
            self.conv_weight,
            self.conv_bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.dt_bias,
            self.A_log,
            self.D,
            conv_state_BCE=state.buffers["conv"],
            ssm_state_BEN=state.buffers["ssm"],
        )

    def _mix(self, u_BTE: Tensor, context: BatchContext, state: RecurrentState | None) -> Tensor:
        """Convolution and scan over the columns; the scan output with the D skip, (B, T, E)."""
        padding, resets = context.padding(u_BTE.device), context.resets()
        single = u_BTE.shape[1] == 1 and padding is None and not torch.is_grad_enabled()
        if state is not None and single:
            return self._mix_slots(u_BTE[:, 0], state)[:, None]
        if padding is not None:
            u_BTE = u_BTE.masked_fill(padding, 0)  # as if the row started after it
        conv_state = None if state is None else state.buffers["conv"].to(u_BTE.dtype)
        x_BTE = causal_conv(
            u_BTE,
            own_part(self.conv_weight),
            own_part(self.conv_bias),
            initial_state_BCE=conv_state,
            resets_BT=resets,
        )
        if padding is not None:
            x_BTE = x_BTE.masked_fill(padding, 0)  # the zero state stays zero
        y_BTE, last_BEN = selective_scan(
            x_BTE,
            *self._scan_inputs(x_BTE),
            own_part(self.D),
            delta_bias_E=own_part(self.dt_bias),
            initial_state_BEN=None if state is None else state.buffers["ssm"],
            resets_BT=resets,
        )
        if state is not None and conv_state is not None:
            state.buffers["ssm"].copy_(last_BEN)
            tail = torch.cat((conv_state, u_BTE[:, -conv_state.shape[1] :]), dim=1)
            state.buffers["conv"].copy_(tail[:, tail.shape[1] - conv_state.shape[1] :])
        return y_BTE

    def _mix_one(self, u_BE: Tensor, state: RecurrentState) -> Tensor:
        """One decode step, (B, E)."""
        x_BE = causal_conv_step(
            u_BE, self.conv_weight, self.conv_bias, state_BCE=state.buffers["conv"]
        )
        return selective_scan_step(
            x_BE,
            *self._scan_inputs(x_BE),
            self.D,
            delta_bias_E=self.dt_bias,
            state_BEN=state.buffers["ssm"],
        )

    def _scan_inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """delta (before bias and softplus), A, B and C, all functions of the input but A."""
        dt, B, C = self.x_proj(x).split(self.splits, dim=-1)
        A_EN = -torch.exp(own_part(self.A_log))
        return self.dt_proj(dt), A_EN, own_part(B), own_part(C)
