"""AdamW over groups of parameters by their role, and the clipping of their gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sambay.model.roles import Role, parameter_roles
from sambay.train.config import OptimizerConfig
from sambay.train.distributed import World
from sambay.train.pieces import pieces_of

_MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with decoupled weight decay, one amount for matrix-like parameters, one for all others.

    By default vector-like ones (embeddings, norms, biases, convolutions, SSM parameters) are not
    decayed (arXiv 2507.06607, section 3.1 and table 6). The fused implementation measured 2.5 times
    the speed of the plain loop on the CPU, and 5 to 9 times that of the foreach one.
    """
    roles = parameter_roles(model)
    groups: dict[tuple[object, ...], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        settings = role_settings(config, roles[name])
        # One fused update takes tensors of one mesh only.
        key = (*settings.values(), getattr(parameter, "device_mesh", None))
        groups.setdefault(key, settings | {"params": []})["params"].append(parameter)
    return torch.optim.AdamW(
        list(groups.values()),
        lr=config.peak_learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def role_settings(config: OptimizerConfig, role: Role) -> dict[str, float]:
    """What AdamW does with the parameters of a role: factor on the rate, and weight decay."""
    if role is Role.MATRIX:
        return {
            "weight_decay": config.weight_decay,
            "learning_rate_factor": config.matrix_learning_rate_factor,
        }
    return {"weight_decay": config.vector_weight_decay, "learning_rate_factor": 1.0}


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its multiple of `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["learning_rate_factor"]


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of all gradients together, over all processes."""
    by_groups: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            local, groups = _local(parameter.grad)
            by_groups.setdefault(groups, []).append(local)
    norms = {groups: nn.utils.get_total_norm(held) for groups, held in by_groups.items()}
    if not any(norms):
        return next(iter(norms.values())) if norms else torch.tensor(0.0)
    # One small sum for each way in which gradients are spread; torch's own needs as many for each
    # mesh, and warns of it.
    squares = []
    for groups, norm in norms.items():
        square = norm.double().square()
        for group in groups:
            dist.all_reduce(square, group=group)
        squares.append(square)
    return torch.stack(squares).sum().sqrt().to(next(iter(norms.values())).dtype)


def _local(gradient: Any) -> tuple[Tensor, tuple[dist.ProcessGroup, ...]]:
    """What this process holds of a gradient, and the groups whose processes hold other parts."""
    if not hasattr(gradient, "to_local"):
        return gradient, ()
    mesh = gradient.device_mesh
    spread = [not place.is_replicate() for place in gradient.placements]
    groups = [mesh.get_group(index) for index in range(mesh.ndim) if spread[index]]
    return gradient.to_local(), tuple(groups)


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients down so that their norm, which is `norm`, is at most `max_norm`."""
    for group in _by_mesh(parameters):
        nn.utils.clip_grads_with_norm_(group, max_norm, norm)


def _by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Those with gradients, in groups that one operation may take together."""
    groups: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups.setdefault(getattr(parameter.grad, "device_mesh", None), []).append(parameter)
    return list(groups.values())


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Both moments of every parameter, keyed "exp_avg.<parameter>" and "exp_avg_sq.<parameter>".

    Made (as zeros) where no step was taken yet, so that a checkpoint can be read into them.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        for moment in _MOMENTS:
            if moment not in state:
                state[moment] = torch.zeros_like(parameter)
            tensors[f"{moment}.{name}"] = state[moment]
    return tensors


def set_optimizer_step(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], step: int
) -> None:
    """Tell AdamW how many updates its moments have seen (its bias correction)."""
    for parameter in parameters:
        device = parameter.device
        optimizer.state[parameter]["step"] = torch.tensor(float(step), device=device)


def first_nonfinite_gradient(model: nn.Module, world: World) -> str | None:
    """The name of the first parameter whose gradient holds a NaN or an infinity on any process."""
    names = [name for name, _ in model.named_parameters()]
    first = len(names)
    for number, parameter in enumerate(model.parameters()):
        if parameter.grad is not None:
            parts = pieces_of(parameter.grad).parts
            if not all(bool(part.values.isfinite().all()) for part in parts):
                first = number
                break
    first = -world.max(-first)
    return names[first] if first < len(names) else None
