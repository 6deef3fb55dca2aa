"""Every initialisation in one place.

| parameter                   | standard               | mup_published       | mup_released        |
| --------------------------- | ---------------------- | ------------------- | ------------------- |
| matrices                    | N(0, 0.02)             | U(+-1/sqrt(fan in)) | U(+-1/sqrt(fan in)) |
| ... into the residual       | divided by sqrt(2 L)   | not divided         | divided if tied     |
| embedding, tied             | N(0, 0.02)             | N(0, 0.02)          | N(0, 0.02)          |
| embedding and head, untied  | N(0, 1e-4), N(0, 0.02) | N(0, 1e-4), 0       | N(0, 1e-4), 0       |

The same under every scheme:

| convolution, weight and bias | U(+-1/sqrt(d_conv))                                         |
| dt bias                      | softplus inverse of exp(U(ln 0.001, ln 0.1)), at least 1e-4 |
| A_log of Mamba, D            | ln(1..N) in every row (S4D-real), 1                         |
| A_log of Mamba-2             | ln(U(1, 16)), a decay per head                              |
| A_log of Gated DeltaNet      | ln(U(0, 16)), not below ln(1e-4)                            |
| differential lambdas         | N(0, 0.1)                                                   |
| norms, linear biases         | 1 (bias 0), 0                                               |

L is the depth. "Published" is table 6 of arXiv 2507.06607; the released code divides the residual
matrices of tied models as well, and that is what the published losses were trained with.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn

from sambay.layers.attention import DifferentialMaps
from sambay.layers.gated_delta import GatedDelta
from sambay.layers.mamba import Mamba
from sambay.layers.mamba2 import Mamba2
from sambay.layers.norm import GatedRMSNorm, LayerNorm, RMSNorm
from sambay.layers.projection import ResidualProjection
from sambay.spec import InitScheme, ModelConfig

if TYPE_CHECKING:
    from sambay.model.model import LanguageModel

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4
RATE_MAX, RATE_FLOOR = 16.0, 1e-4  # of decay, per head; a head that never forgets has no A_log

Fill = Callable[[Tensor, Generator], object]


@torch.no_grad()
def initialise(
    model: LanguageModel, scheme: InitScheme | str = InitScheme.MUP_RELEASED, seed: int = 0
) -> None:
    """Fill every parameter of a `LanguageModel`.

    Each parameter has a generator of its own, seeded by `seed` and its name, and is drawn on the
    CPU in float32: the result depends neither on the order of modules nor on device or sharding.

    Raises:
        ConfigError: an unknown scheme.
    """
    for name, make in value_makers(model, scheme, seed).items():
        model.get_parameter(name).copy_(make())


def value_makers(
    model: LanguageModel, scheme: InitScheme | str, seed: int
) -> dict[str, Callable[[], Tensor]]:
    """For each parameter a function that makes its first value, float32 on the CPU.

    The model may be on the meta device; the functions can be called in any order.

    Raises:
        ConfigError: an unknown scheme.
    """
    fills = _fills(model, InitScheme(scheme))

    def make(name: str, shape: torch.Size, fill: Fill) -> Tensor:
        value = torch.empty(shape, dtype=torch.float32, device="cpu")
        fill(value, torch.Generator().manual_seed(_seed_of(seed, name)))
        return value

    return {
        name: functools.partial(make, name, parameter.shape, fills[id(parameter)])
        for name, parameter in model.named_parameters()
    }


def _fills(model: LanguageModel, scheme: InitScheme) -> dict[int, Fill]:
    """How to fill each parameter, by its identity."""
    fills = {
        id(parameter): fill
        for module in model.modules()
        for parameter, fill in module_fills(module, model.config, scheme)
    }
    fills[id(model.head.weight)] = head_fill(scheme)
    fills[id(model.embedding.weight)] = embedding_fill(model.config)  # also of a tied head
    return fills


def embedding_fill(config: ModelConfig) -> Fill:
    """How the embedding is filled, under every scheme."""
    return _normal(0.02 if config.tie_embeddings else 1e-4)


def head_fill(scheme: InitScheme) -> Fill:
    """How a head is filled that is not the embedding."""
    return _normal(0.02) if scheme is InitScheme.STANDARD else _constant(0.0)


def module_fills(
    module: nn.Module, config: ModelConfig, scheme: InitScheme
) -> list[tuple[Tensor, Fill]]:
    """How the parameters are filled that a module itself holds; none for what is inside it."""
    mup = scheme is not InitScheme.STANDARD
    divided = not mup or (scheme is InitScheme.MUP_RELEASED and config.tie_embeddings)
    into_residual = 1 / math.sqrt(2 * config.num_layers) if divided else 1.0
    fills: list[tuple[Tensor | None, Fill]] = []
    match module:
        case Mamba():
            fills = [
                (module.conv_weight, _uniform(config.d_conv)),
                (module.conv_bias, _uniform(config.d_conv)),
                (module.dt_bias, _time_step_bias),
                (module.A_log, _s4d_real),
                (module.D, _constant(1.0)),
            ]
        case Mamba2():
            fills = [
                (module.conv_weight, _uniform(config.d_conv)),
                (module.conv_bias, _uniform(config.d_conv)),
                (module.dt_bias, _time_step_bias),
                (module.A_log, _decay_rate(1.0)),
                (module.D, _constant(1.0)),
            ]
        case GatedDelta():
            fills = [
                (module.conv_weight, _uniform(config.d_conv)),
                (module.dt_bias, _time_step_bias),
                (module.A_log, _decay_rate(0.0)),
            ]
        case DifferentialMaps():
            fills = [(getattr(module, name), _normal(0.1)) for name in module.float32_parameters]
            fills.append((module.norm_weight, _constant(1.0)))
        case nn.Linear():
            factor = into_residual if isinstance(module, ResidualProjection) else 1.0
            fills = [(module.weight, _matrix(scheme, factor)), (module.bias, _constant(0.0))]
        case RMSNorm() | GatedRMSNorm():
            fills = [(module.weight, _constant(1.0))]
        case LayerNorm():
            fills = [(module.weight, _constant(1.0)), (module.bias, _constant(0.0))]
    return [(parameter, fill) for parameter, fill in fills if parameter is not None]


def _matrix(scheme: InitScheme, factor: float) -> Fill:
    def fill(value: Tensor, generator: Generator) -> None:
        if scheme is InitScheme.STANDARD:
            value.normal_(0, 0.02, generator=generator)
        else:
            _uniform(value.shape[1])(value, generator)
        value.mul_(factor)

    return fill


def _uniform(fan_in: int) -> Fill:
    bound = 1 / math.sqrt(fan_in)
    return lambda value, generator: value.uniform_(-bound, bound, generator=generator)


def _normal(std: float) -> Fill:
    return lambda value, generator: value.normal_(0, std, generator=generator)


def _constant(constant: float) -> Fill:
    return lambda value, generator: value.fill_(constant)


def _time_step_bias(value: Tensor, generator: Generator) -> None:
    """softplus(bias) is log-uniform between DT_MIN and DT_MAX."""
    value.uniform_(math.log(DT_MIN), math.log(DT_MAX), generator=generator)
    value.exp_().clamp_(min=DT_FLOOR)
    value.copy_(value + torch.log(-torch.expm1(-value)))


def _decay_rate(least: float) -> Fill:
    """The logarithm of a rate that is uniform between `least` and RATE_MAX."""

    def fill(value: Tensor, generator: Generator) -> None:
        value.uniform_(least, RATE_MAX, generator=generator).clamp_(min=RATE_FLOOR).log_()

    return fill


def _s4d_real(value: Tensor, generator: Generator) -> None:
    value.copy_(torch.arange(1, value.shape[1] + 1).log().expand_as(value))


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
