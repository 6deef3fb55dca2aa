"""What cannot work is refused before a weight is read: the settings of vLLM beside the model's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sambay.errors import ConfigError, MissingPackage
from sambay.serve.heads import HeadPlan, plan_heads
from sambay.serve.platform import attention_head_sizes, is_cpu
from sambay.spec import (
    GatedMemory,
    LayerKind,
    MemorySource,
    ModelConfig,
    RecurrentKind,
    prefill_split,
)

try:
    from vllm.model_executor.models.config import VerifyAndUpdateConfig
except ModuleNotFoundError as error:
    raise MissingPackage("vllm", "serving", "vllm") from error

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_PLAIN_CACHE = ("auto", "float32", "bfloat16", "float16", "half", "float")


class Verification(VerifyAndUpdateConfig):
    """Asked by vLLM when its configuration is complete, in the process that starts the others."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what cannot work and write down how keys are shared out among processes.

        Raises:
            ConfigError: the first setting that cannot work, with the reason and the remedy.
        """
        served = vllm_config.model_config.hf_config
        config: ModelConfig = served.model_config()
        processes = vllm_config.parallel_config.tensor_parallel_size
        plan = plan_heads(config, processes, attention_head_sizes())
        for problem in _problems(vllm_config, config, plan):
            raise ConfigError(problem)
        # The number of key heads decides how large a page of the cache is.
        served.num_key_value_heads = plan.total_keys
        vllm_config.model_config.model_arch_config.total_num_kv_heads = plan.total_keys
        # Each layer states its own window.
        vllm_config.cache_config.sliding_window = None


def _problems(vllm_config: VllmConfig, config: ModelConfig, plan: HeadPlan) -> Iterator[str]:
    """Why this cannot be served; nothing if it can."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    kinds = [layer.kind for layer in config.layers]
    if all(kind is LayerKind.MAMBA for kind in kinds):
        yield (
            f"layer_pattern = '{config.layer_pattern}' has no attention; vLLM sizes its cache by "
            "attention layers, generate with `sambay generate` instead"
        )
    if parallel.pipeline_parallel_size > 1:
        yield (
            "pipeline_parallel_size > 1: the cross-decoder reads the memory and the keys of the "
            "self-decoder, which would lie in another process; use tensor_parallel_size"
        )
    for name in ("prefill_context_parallel_size", "decode_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            yield f"{name} > 1 is not supported by the recurrent layers; leave it out"
    yield from _hosted_problems(vllm_config, config)
    yield from _parallel_problems(config, plan)
    if vllm_config.speculative_config is not None:
        yield (
            "speculative decoding is not supported: recurrent states cannot be rolled back to the "
            "last accepted token; leave out --speculative-config"
        )
    if vllm_config.quant_config is not None:
        yield "quantised weights are not supported by the plugin; serve the unquantised folder"
    if cache.cache_dtype not in _PLAIN_CACHE:
        yield f"kv_cache_dtype = '{cache.cache_dtype}' is not supported; leave it out"
    if getattr(cache, "mamba_cache_mode", "none") == "all":
        yield "mamba_cache_mode = 'all' is not supported; 'align' is, and is the default"
    if getattr(cache, "use_replayssm", False):
        yield "--use-replayssm is for Mamba-2 layers of vLLM's own; leave it out"
    if vllm_config.model_config.runner_type != "generate":
        yield f"runner = '{vllm_config.model_config.runner_type}'; these models generate text only"
    if cache.kv_sharing_fast_prefill:
        yield from _fast_prefill_problems(kinds, prefill_split(config.layers))
    if vllm_config.lora_config is not None:
        yield from _lora_problems(cache, config, plan)


def _parallel_problems(config: ModelConfig, plan: HeadPlan) -> Iterator[str]:
    divided: list[tuple[str, int]] = [("intermediate_size", config.intermediate_size)]
    kinds = {layer.kind for layer in config.layers}
    if LayerKind.MAMBA in kinds and config.recurrent_kind is RecurrentKind.MAMBA:
        divided.append(("the inner width of the Mamba layers", config.d_inner))
    if LayerKind.GATED_MEMORY in kinds and config.memory_source is not MemorySource.ATTENTION:
        divided.append(("the memory", config.memory_size))
    for name, size in divided:
        if size % plan.processes:
            yield f"tensor_parallel_size = {plan.processes} does not divide {name} ({size})"
    if plan.processes > 1 and config.gated_memory is GatedMemory.NORMALISED:
        yield (
            "gated_memory = 'normalised' needs the whole memory in one process: "
            "set tensor_parallel_size to 1"
        )


def _hosted_problems(vllm_config: VllmConfig, config: ModelConfig) -> Iterator[str]:
    """Recurrences that run as this package's own layers, inside vLLM's."""
    if config.recurrent_kind is RecurrentKind.MAMBA:
        return
    if vllm_config.parallel_config.tensor_parallel_size > 1:
        yield (
            f"recurrent_kind = '{config.recurrent_kind}' runs undivided: "
            "set tensor_parallel_size to 1"
        )
    if not is_cpu() and not vllm_config.model_config.enforce_eager:
        yield (
            f"recurrent_kind = '{config.recurrent_kind}' cannot be captured in CUDA graphs; "
            "add --enforce-eager"
        )
    if vllm_config.lora_config is not None:
        yield f"LoRA is not supported with recurrent_kind = '{config.recurrent_kind}'"


def _fast_prefill_problems(kinds: list[LayerKind], split: int) -> Iterator[str]:
    if LayerKind.CROSS not in kinds[split + 1 :]:
        yield (
            "kv_sharing_fast_prefill: vLLM finds the positions to keep through cross-attention "
            "layers, and this model has none behind its last layer with state; leave it out"
        )


def _lora_problems(cache: Any, config: ModelConfig, plan: HeadPlan) -> Iterator[str]:
    if cache.kv_sharing_fast_prefill:
        yield (
            "LoRA cannot be combined with kv_sharing_fast_prefill: vLLM assigns adapters to all "
            "positions, the cross-decoder sees a part of them; leave out one of the two"
        )
    if plan.key_copies > 1:
        yield (
            f"LoRA with tensor_parallel_size = {plan.processes}: the key heads do not divide and "
            "are copied, which adapters of them are not; choose a divisor of "
            f"{plan.key_units}"
        )
    if is_cpu():
        yield (
            "LoRA on a CPU: vLLM's operations there give requests without an adapter that of "
            "another request in the same batch; merge the adapter into the weights, or use a GPU"
        )
