"""Keeping chosen parameters in float32 whatever the rest of a model is cast to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn


class Float32Parameters(nn.Module):
    """A module whose `float32_parameters` survive `.to(bfloat16)`, `.half()` and the like.

    Rates of decay live in exp(-exp(A_log) dt): rounding them to 8 bits changes what a state
    remembers. Casts to float64 are let through.
    """

    float32_parameters: ClassVar[tuple[str, ...]] = ()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Also where a whole model is built in a narrow default dtype."""
        if param is not None and name in self.float32_parameters and _is_narrow(param):
            wide = nn.Parameter(param.data.float(), requires_grad=param.requires_grad)
            vars(wide).update(vars(param))
            param = wide
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        before = {name: getattr(self, name).data for name in self.float32_parameters}
        super()._apply(fn, recurse)
        for name, data in before.items():
            parameter = getattr(self, name)
            if _is_narrow(parameter):
                parameter.data = data.to(device=parameter.device, dtype=torch.float32)
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.float()
        return self


def _is_narrow(tensor: torch.Tensor) -> bool:
    return tensor.dtype.itemsize < torch.float32.itemsize
