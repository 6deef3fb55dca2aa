"""AdamW over two groups of parameters, and the clipping of their gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sambay.model.roles import Role, parameter_roles
from sambay.train.config import OptimizerConfig

_MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with decoupled weight decay on matrix-like parameters only.

    Vector-like ones (embeddings, norms, biases, convolutions, SSM parameters) are not decayed
    (arXiv 2507.06607, section 3.1 and table 6). The fused implementation measured 2.5 times the
    speed of the plain loop on the CPU, and 5 to 9 times that of the foreach one.
    """
    roles = parameter_roles(model)
    matrix, other = [], []
    for name, parameter in model.named_parameters():
        (matrix if roles[name] is Role.MATRIX else other).append(parameter)
    factor = config.matrix_learning_rate_factor
    groups = [
        {"params": matrix, "weight_decay": config.weight_decay, "learning_rate_factor": factor},
        {"params": other, "weight_decay": 0.0, "learning_rate_factor": 1.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.peak_learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its multiple of `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["learning_rate_factor"]


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """The norm of all gradients together, after scaling them down to `max_norm` if above it."""
    return float(nn.utils.clip_grad_norm_(parameters, max_norm))


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


def first_nonfinite_gradient(model: nn.Module) -> str | None:
    """The name of the first parameter whose gradient holds a NaN or an infinity."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            return name
    return None
