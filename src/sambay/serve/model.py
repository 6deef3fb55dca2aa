"""The classes that vLLM looks up by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sambay.errors import CheckpointMismatch, MissingPackage
from sambay.serve.attention import finish_loading
from sambay.serve.decoder import ServedModel
from sambay.serve.heads import plan_heads
from sambay.serve.platform import attention_head_sizes
from sambay.serve.recurrence import stored_shapes
from sambay.serve.sharding import load_tensor
from sambay.serve.weights import misfit, native_tensors, parameter_name, require_all
from sambay.spec import RecurrentKind
from sambay.spec.recurrent import state_shape

try:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.models.interfaces import (
        HasInnerState,
        IsHybrid,
        SupportsLoRA,
        SupportsMambaPrefixCaching,
    )
    from vllm.sequence import IntermediateTensors
except ModuleNotFoundError as error:
    raise MissingPackage("vllm", "serving", "vllm") from error


class SambaYAttentionForCausalLM(nn.Module, SupportsLoRA):
    """A language model of the family, of which only attention keeps state."""

    # Each is one module of the model under its own name, though it has two halves.
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "in_proj": ["in_proj"],
        "kv_proj": ["kv_proj"],
    }
    embedding_modules: ClassVar[dict[str, str]] = {}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.served = vllm_config.model_config.hf_config
        self.config = config = self.served.model_config()
        processes = vllm_config.parallel_config.tensor_parallel_size
        self.heads = plan_heads(config, processes, attention_head_sizes())
        base = f"{prefix}.model" if prefix else "model"
        self.model = ServedModel(vllm_config=vllm_config, prefix=base)
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix="lm_head")
        if config.tie_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embedding)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """(T,) to (T, D)."""
        return self.model.embedding(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(T, D), what the head reads."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits of these rows."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The names of the parameters that were read, which are all of them.

        Raises:
            CheckpointMismatch: tensors that are missing, left over or of another shape.
        """
        parameters = dict(self.named_parameters())
        loaded: set[str] = set()
        for name, tensor in native_tensors(self.config, self.served.model_type, weights):
            own = parameter_name(name, self.config)
            if own not in parameters:
                raise CheckpointMismatch(
                    f"{name} is no tensor of this model; is config.json its own?"
                )
            if ".kv_proj." in own:
                tensor = self.heads.copy_keys(tensor)
            try:
                load_tensor(parameters[own], tensor)
            except (RuntimeError, AssertionError, ValueError) as error:
                raise misfit(name, tensor, parameters[own].shape, error) from error
            loaded.add(own)
        require_all(parameters, loaded)
        finish_loading(self)
        return loaded


class SambaYForCausalLM(
    SambaYAttentionForCausalLM, HasInnerState, IsHybrid, SupportsMambaPrefixCaching
):
    """A language model of the family with recurrent layers, whose states are cached as well."""

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """Of the inputs of the convolution, and of the state: always float32."""
        return vllm_config.model_config.dtype, torch.float32

    @classmethod
    def get_mamba_state_shape_from_config(
        cls, vllm_config: VllmConfig
    ) -> tuple[tuple[int, ...], ...]:
        """Of both, in one process."""
        config = vllm_config.model_config.hf_config.model_config()
        shape = state_shape(config)
        if config.recurrent_kind is not RecurrentKind.MAMBA:
            return stored_shapes(shape.conv, shape.ssm)
        processes = vllm_config.parallel_config.tensor_parallel_size
        before, channels = shape.conv
        return stored_shapes(
            (before, channels // processes), (shape.ssm[0] // processes, *shape.ssm[1:])
        )

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        """How vLLM copies both between pages when it reuses a prefix."""
        return MambaStateCopyFuncCalculator.mamba1_state_copy_func()
