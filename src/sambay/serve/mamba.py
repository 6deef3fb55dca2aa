"""The Mamba layer on vLLM's paged states.

Its rows are tokens of many requests: first one token each of the requests that decode, then the
prompts or parts of prompts, one after the other. Shape letters: T tokens, D hidden, E inner
channels of this process, N state, R rank of the time step, W convolution width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sambay.errors import MissingPackage
from sambay.ops.causal_conv import causal_conv, causal_conv_step
from sambay.ops.selective_scan import selective_scan, selective_scan_step
from sambay.serve.platform import is_cpu
from sambay.serve.recurrence import PagedRecurrence
from sambay.serve.sharding import shard_rows
from sambay.spec import LayerSpec, MemorySource, ModelConfig

try:
    from vllm.config import VllmConfig
    from vllm.distributed import get_tensor_model_parallel_world_size
    from vllm.model_executor.layers.linear import (
        ColumnParallelLinear,
        MergedColumnParallelLinear,
        RowParallelLinear,
    )
except ModuleNotFoundError as error:
    raise MissingPackage("vllm", "serving", "vllm") from error


class ServedMamba(PagedRecurrence):
    """Mamba-1 without inner norms, its channels divided among the processes.

    Both the states and the parameters of the recurrence are float32, whatever the weights are.
    """

    def __init__(
        self, config: ModelConfig, layer: LayerSpec, vllm_config: VllmConfig, prefix: str
    ) -> None:
        D, N, R = config.hidden_size, config.d_state, config.dt_rank
        E = config.d_inner // get_tensor_model_parallel_world_size()
        super().__init__(
            vllm_config,
            prefix,
            conv_shape=(config.d_conv - 1, E),
            ssm_shape=(E, N),
            width=D,
            memory_size=E if layer.publishes_memory is MemorySource.MAMBA else 0,
        )
        self.splits = (R, N, N)
        self.in_proj = MergedColumnParallelLinear(
            D, [config.d_inner] * 2, bias=False, prefix=f"{prefix}.in_proj"
        )
        self.conv_weight = nn.Parameter(torch.empty(E, config.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(E))
        self.x_proj = RowParallelLinear(
            config.d_inner, R + 2 * N, bias=False, prefix=f"{prefix}.x_proj"
        )
        self.dt_proj = ColumnParallelLinear(R, config.d_inner, bias=False, prefix=f"{prefix}.dt")
        self.dt_bias = nn.Parameter(torch.empty(E, dtype=torch.float32))
        self.A = nn.Parameter(torch.empty(E, N, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(E, dtype=torch.float32))
        self.out_proj = RowParallelLinear(
            config.d_inner, D, bias=False, prefix=f"{prefix}.out_proj"
        )
        for parameter in (self.conv_weight, self.conv_bias, self.dt_bias, self.D):
            shard_rows(parameter)
        # The files have the logarithm of -A, as `A_log`.
        shard_rows(self.A, lambda A_log: -torch.exp(A_log.float()))
        self.on_cpu = is_cpu()

    def warm_up(self, x_TD: Tensor) -> None:
        """The largest intermediate values, without a state to read or write."""
        u_TE, z_TE = self.in_proj(x_TD)[0].chunk(2, dim=-1)
        self.out_proj(u_TE * F.silu(z_TE))

    def mix(self, x_TD: Tensor, rows: Any) -> tuple[Tensor, Tensor]:
        """(T, D) to (T, D), and the memory (T, E): the scan output before its gate."""
        u_TE, z_TE = self.in_proj(x_TD)[0].chunk(2, dim=-1)
        y_TE = self._scan_on_cpu(u_TE, rows) if self.on_cpu else self._scan_on_gpu(u_TE, rows)
        # The CPU build's matrix product takes contiguous rows only.
        return self.out_proj((y_TE * F.silu(z_TE)).contiguous())[0], y_TE

    def _scan_inputs(self, x_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """delta (before its bias and softplus), B and C, of all rows at once."""
        dt, B, C = self.x_proj(x_TE)[0].split(self.splits, dim=-1)
        return self.dt_proj(dt.contiguous())[0], B, C

    def _scan_on_cpu(self, u_TE: Tensor, rows: Any) -> Tensor:
        """Convolution and scan by the operations of this package."""
        conv, ssm = self.states()
        count, spans = rows.num_decode_tokens, self.spans(rows)
        x_TE = torch.empty_like(u_TE, memory_format=torch.contiguous_format)
        if count:
            index = self.decode_index(rows)
            earlier = conv[index]
            x_TE[:count] = causal_conv_step(
                u_TE[:count].contiguous(), self.conv_weight, self.conv_bias, state_BCE=earlier
            )
            conv[index] = earlier
        for first, end, slot, continues in spans:
            u_1TE = u_TE[None, first:end]
            earlier = conv[slot : slot + 1] if continues else torch.zeros_like(conv[:1])
            earlier = earlier.to(u_TE.dtype)
            x_TE[first:end] = causal_conv(
                u_1TE, self.conv_weight, self.conv_bias, initial_state_BCE=earlier
            )[0]
            tail = torch.cat((earlier, u_1TE[:, -earlier.shape[1] :]), dim=1)
            conv[slot] = tail[0, tail.shape[1] - earlier.shape[1] :]
        delta, B, C = self._scan_inputs(x_TE)
        y_TE = torch.empty_like(x_TE)
        if count:
            index = self.decode_index(rows)
            state = ssm[index]
            y_TE[:count] = selective_scan_step(
                x_TE[:count], delta[:count], self.A, B[:count], C[:count], self.D,
                delta_bias_E=self.dt_bias, state_BEN=state,
            )  # fmt: skip
            ssm[index] = state
        for first, end, slot, continues in spans:
            part = slice(first, end)
            y, last = selective_scan(
                x_TE[None, part], delta[None, part], self.A, B[None, part], C[None, part], self.D,
                delta_bias_E=self.dt_bias,
                initial_state_BEN=ssm[slot : slot + 1].contiguous() if continues else None,
            )  # fmt: skip
            y_TE[part], ssm[slot] = y[0], last[0]
        return y_TE

    def _scan_on_gpu(self, u_TE: Tensor, rows: Any) -> Tensor:
        """Convolution and scan by vLLM's kernels, which find states by index themselves."""
        from vllm.model_executor.layers.mamba.ops.causal_conv1d import (
            causal_conv1d_fn,
            causal_conv1d_update,
        )
        from vllm.model_executor.layers.mamba.ops.mamba_ssm import selective_scan_fn
        from vllm.model_executor.layers.mamba.ops.ssu_dispatch import selective_state_update

        conv, ssm = self.states()
        conv = conv.transpose(-1, -2)
        count, parts = rows.num_decode_tokens, []
        if count:
            index = rows.state_indices_tensor_d
            x_BE = causal_conv1d_update(
                u_TE[:count].contiguous(), conv, self.conv_weight, self.conv_bias, "silu",
                conv_state_indices=index,
            )  # fmt: skip
            delta, B, C = self._scan_inputs(x_BE)
            y_BE = torch.empty_like(x_BE)
            selective_state_update(
                ssm, x_BE, delta, self.A, B, C, self.D, self.dt_bias,
                z=None, dt_softplus=True,
                state_batch_indices=index, dst_state_batch_indices=index, out=y_BE,
            )  # fmt: skip
            parts.append(y_BE)
        if rows.num_prefill_tokens:
            x_ET = causal_conv1d_fn(
                u_TE[count:].transpose(0, 1), self.conv_weight, self.conv_bias,
                activation="silu", conv_states=conv,
                has_initial_state=rows.has_initial_states_p,
                cache_indices=rows.state_indices_tensor_p,
                query_start_loc=rows.query_start_loc_p,
                metadata=rows,
            )  # fmt: skip
            delta, B, C = self._scan_inputs(x_ET.transpose(0, 1).contiguous())
            y_ET = selective_scan_fn(
                x_ET, ssm, delta.transpose(0, 1), self.A, B.transpose(0, 1), C.transpose(0, 1),
                self.D, None, self.dt_bias, delta_softplus=True,
                cache_indices=rows.state_indices_tensor_p,
                has_initial_state=rows.has_initial_states_p,
                query_start_loc=rows.query_start_loc_p,
            )  # fmt: skip
            parts.append(y_ET.transpose(0, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)
