"""What a step does to the parameters, by their role: gradient norms and learning rates."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sambay.model.roles import Role, parameter_roles
from sambay.train.optim import gradient_norm


def role_norms(model: nn.Module) -> dict[Role, Tensor]:
    """The norm of the gradients of each role, over all processes; roles without any are left out.

    With gradients that are spread over processes, all of them ask at the same time.
    """
    roles = parameter_roles(model)
    members: dict[Role, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            members.setdefault(roles[name], []).append(parameter)
    return {role: gradient_norm(members[role]) for role in Role if role in members}


def role_norm_metrics(model: nn.Module) -> dict[str, float]:
    """`role_norms` as the metrics "gradient_norm/ROLE", read from the device at once."""
    norms = role_norms(model)
    values = torch.stack(list(norms.values())).tolist() if norms else []
    return {f"gradient_norm/{role}": value for role, value in zip(norms, values, strict=True)}


def learning_rate_metrics(
    model: nn.Module, optimizer: torch.optim.Optimizer, rate: float
) -> dict[str, float]:
    """The metric "learning_rate", and "learning_rate/ROLE" for roles that have another."""
    factors: dict[int, float] = {}
    for group in optimizer.param_groups:
        parameters: Iterable[nn.Parameter] = group["params"]
        factors |= {id(parameter): group["learning_rate_factor"] for parameter in parameters}
    roles = parameter_roles(model)
    values = {"learning_rate": rate}
    for name, parameter in model.named_parameters():
        factor = factors.get(id(parameter), 1.0)
        if factor != 1:
            values[f"learning_rate/{roles[name]}"] = rate * factor
    return values
