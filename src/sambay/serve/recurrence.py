"""What all recurrent layers share under vLLM: pages with two states, and one entry for a batch."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sambay.errors import MissingPackage
from sambay.layers.context import BatchContext, SharedStates
from sambay.layers.gated_delta import GatedDelta
from sambay.layers.mamba2 import Mamba2
from sambay.layers.state import LayerState
from sambay.spec import LayerSpec, MemorySource, ModelConfig, RecurrentKind
from sambay.spec.recurrent import state_shape

try:
    from vllm.config import VllmConfig
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.layers.mamba import mamba_mixer  # defines torch.ops.vllm.mamba_mixer
    from vllm.model_executor.layers.mamba.abstract import MambaBase
    from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
    from vllm.utils.torch_utils import _encode_layer_name
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
except ModuleNotFoundError as error:
    raise MissingPackage("vllm", "serving", "vllm") from error

assert mamba_mixer is not None

Span = tuple[int, int, int, bool]


class PagedRecurrence(nn.Module, MambaBase):
    """A recurrent layer whose states lie in vLLM's pages: `conv` and `ssm`.

    `conv` are the last inputs of the convolution in the dtype of the activations, oldest first;
    `ssm` is float32. To vLLM it is a Mamba-1 layer, whatever the shapes.

    memory_size: of the memory to publish, 0 if none is.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        prefix: str,
        *,
        conv_shape: tuple[int, int],
        ssm_shape: tuple[int, ...],
        width: int,
        memory_size: int,
    ) -> None:
        super().__init__()
        self.prefix = prefix
        self.width, self.memory_size = width, memory_size
        self.state_shapes = stored_shapes(conv_shape, ssm_shape)
        self.state_dtypes = (vllm_config.model_config.dtype, torch.float32)
        self.kv_cache = (torch.tensor([]), torch.tensor([]))
        layers = vllm_config.compilation_config.static_forward_context
        assert prefix not in layers, f"two layers are called {prefix}"
        layers[prefix] = self

    def forward(self, x_TD: Tensor, angles: Any) -> tuple[Tensor, Tensor | None]:
        """(T, D) to (T, D) and the memory, if this layer publishes one.

        Compiled graphs are cut here: what happens to pages is hidden behind one operator, which
        vLLM has for its own Mamba layers. The memory travels in the same tensor.
        """
        output = x_TD.new_empty(x_TD.shape[0], self.width + self.memory_size)
        torch.ops.vllm.mamba_mixer(x_TD, output, _encode_layer_name(self.prefix))
        if not self.memory_size:
            return output, None
        return output[:, : self.width], output[:, self.width :]

    def forward_impl(self, hidden_states: Tensor, output: Tensor) -> None:
        """Fill `output` for the tokens of this batch; called by the operator."""
        rows = get_forward_context().attn_metadata
        rows = rows.get(self.prefix) if isinstance(rows, dict) else rows
        if rows is None:  # vLLM measures memory before there are pages
            self.warm_up(hidden_states)
            output.zero_()
            return
        count = rows.num_decode_tokens + rows.num_prefill_tokens
        y, memory = self.mix(hidden_states[:count], rows)
        output[:count, : self.width] = y
        if memory is not None and self.memory_size:
            output[:count, self.width :] = memory
        output[count:].zero_()

    @abc.abstractmethod
    def warm_up(self, x_TD: Tensor) -> None:
        """Compute something of the size of `mix`, without states."""

    @abc.abstractmethod
    def mix(self, x_TD: Tensor, rows: Any) -> tuple[Tensor, Tensor | None]:
        """(T, D) to (T, D) and the memory; advances the states of the requests in `rows`."""

    def states(self) -> tuple[Tensor, Tensor]:
        """The pages: conv (pages, W - 1, channels), whichever way it lies, and ssm (pages, ...)."""
        conv, ssm = self.kv_cache[0], self.kv_cache[1]
        return (conv.transpose(-1, -2) if is_conv_state_dim_first() else conv), ssm

    def decode_index(self, rows: Any) -> Tensor:
        """The page of each request that decodes."""
        index = rows.state_indices_tensor_d
        return index.view(index.shape[0], -1)[: rows.num_decode_tokens, 0].long()

    def spans(self, rows: Any) -> list[Span]:
        """For each part of a prompt its first and last token, its page, and whether that counts."""
        if not rows.num_prefill_tokens:
            return []
        ends = (rows.query_start_loc_p + rows.num_decode_tokens).tolist()
        slots, continues = rows.state_indices_tensor_p.tolist(), rows.has_initial_states_p.tolist()
        return list(zip(ends[:-1], ends[1:], slots, continues, strict=True))

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """Asked by vLLM."""
        return self.state_shapes

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Asked by vLLM."""
        return self.state_dtypes

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """Asked by vLLM: how batches are described to this layer."""
        return MambaAttentionBackendEnum.MAMBA1


class HostedRecurrence(PagedRecurrence):
    """Mamba-2 or Gated DeltaNet: this package's own layer, run on the states of each request.

    Undivided, and one prompt after the other.
    """

    classes: ClassVar = {RecurrentKind.MAMBA2: Mamba2, RecurrentKind.GATED_DELTA: GatedDelta}

    def __init__(
        self, config: ModelConfig, layer: LayerSpec, vllm_config: VllmConfig, prefix: str
    ) -> None:
        shape = state_shape(config)
        memory_size = config.d_inner if layer.publishes_memory is MemorySource.MAMBA else 0
        super().__init__(
            vllm_config,
            prefix,
            conv_shape=shape.conv,
            ssm_shape=shape.ssm,
            width=config.hidden_size,
            memory_size=memory_size,
        )
        self.inner = self.classes[config.recurrent_kind](config, layer)

    def warm_up(self, x_TD: Tensor) -> None:
        """A forward from empty states."""
        self.inner(x_TD[None], BatchContext(0, x_TD.shape[0]), SharedStates(), None)

    def mix(self, x_TD: Tensor, rows: Any) -> tuple[Tensor, Tensor | None]:
        """The requests that decode together, the prompts one by one."""
        conv, ssm = self.states()
        parts: list[tuple[Tensor, SharedStates]] = []
        count = rows.num_decode_tokens
        if count:
            index = self.decode_index(rows)
            state = LayerState(conv=conv[index].float(), ssm=ssm[index])
            y, shared = self.inner(x_TD[:count, None], BatchContext(0, 1), SharedStates(), state)
            conv[index] = state.buffers["conv"].to(conv.dtype)
            ssm[index] = state.buffers["ssm"]
            parts.append((y[:, 0], _flat(shared, 1)))
        for first, end, slot, continues in self.spans(rows):
            page = slice(slot, slot + 1)
            state = LayerState(conv=conv[page].float().clone(), ssm=ssm[page].clone())
            if not continues:
                for buffer in state.buffers.values():
                    buffer.zero_()
            context = BatchContext(0, end - first)
            y, shared = self.inner(x_TD[None, first:end], context, SharedStates(), state)
            conv[page] = state.buffers["conv"].to(conv.dtype)
            ssm[page] = state.buffers["ssm"]
            parts.append((y[0], _flat(shared, 0)))
        y = torch.cat([y for y, _ in parts])
        if not self.memory_size:
            return y, None
        return y, torch.cat([shared.memory for _, shared in parts if shared.memory is not None])


def stored_shapes(
    conv_shape: tuple[int, int], ssm_shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How both states lie in a page; vLLM can be told to turn the first one over."""
    return (conv_shape[::-1] if is_conv_state_dim_first() else conv_shape), ssm_shape


def _flat(shared: SharedStates, column: int) -> SharedStates:
    """The memory of rows with one token each (column 1), or of one row of tokens (column 0)."""
    if shared.memory is None:
        return shared
    return SharedStates(memory=shared.memory[:, 0] if column else shared.memory[0])
