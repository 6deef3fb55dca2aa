"""What the machine that vLLM runs on offers to this package's layers."""

from __future__ import annotations

from sambay.errors import MissingPackage

try:
    from vllm.platforms import current_platform
except ModuleNotFoundError as error:
    raise MissingPackage("vllm", "serving", "vllm") from error


def is_cpu() -> bool:
    """Whether vLLM runs on the CPU."""
    return current_platform.is_cpu()


def attention_head_sizes() -> tuple[int, ...] | None:
    """The sizes of heads that vLLM's attention takes here; None for any multiple of 8."""
    if not is_cpu():
        return None
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return tuple(CPUAttentionBackend.get_supported_head_sizes())
