"""Reading stored tensors into the parameters of one of several processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sambay.errors import MissingPackage

try:
    from vllm.distributed import (
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
    )
    from vllm.model_executor.utils import set_weight_attrs
except ModuleNotFoundError as error:
    raise MissingPackage("vllm", "serving", "vllm") from error


def shard_rows(parameter: nn.Parameter, change: Callable[[Tensor], Tensor] | None = None) -> None:
    """Let a parameter be loaded with its process' share of the rows, after `change`."""

    def load(target: nn.Parameter, stored: Tensor) -> None:
        stored = stored if change is None else change(stored)
        rank, processes = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        target.data.copy_(stored.chunk(processes)[rank])

    set_weight_attrs(parameter, {"weight_loader": load})


def load_tensor(parameter: nn.Parameter, stored: Tensor) -> None:
    """Load by the parameter's own way, or by a plain copy."""
    load = getattr(parameter, "weight_loader", None)
    if load is not None:
        load(parameter, stored)
        return
    with torch.no_grad():
        parameter.copy_(stored)
