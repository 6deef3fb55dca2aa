"""What a run does with the parameters of each role, as text: first values, rate, weight decay.

Reads the roles that the modules declare and the values that initialisation draws, on a model of
which only shapes exist.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from sambay.layers.projection import ResidualProjection
from sambay.model import LanguageModel
from sambay.model.init import Fill, embedding_fill, head_fill, module_fills
from sambay.model.roles import Role, parameter_roles
from sambay.scaling.rules import RULES, first_weights
from sambay.train.config import RunConfig
from sambay.train.optim import role_settings

_SAMPLE = 2**15  # values drawn of a parameter, to see how widely they spread
_PLACES: dict[type[nn.Module], str] = {ResidualProjection: "into the residual stream"}


@dataclass
class _Row:
    """Parameters of one role that begin by the same rule."""

    role: Role
    rule: str
    names: list[str] = field(default_factory=list)  # of parameters in their layer, or a place
    tensors: int = 0
    parameters: int = 0
    spreads: list[float] = field(default_factory=list)

    @property
    def spread(self) -> str:
        """The least and greatest standard deviation."""
        low, high = f"{min(self.spreads):.3g}", f"{max(self.spreads):.3g}"
        return low if low == high else f"{low} to {high}"


def roles_table(config: RunConfig) -> list[str]:
    """The table as lines, and one line with the multipliers of the model.

    "spread" is the standard deviation of what initialisation draws, measured on a sample.
    """
    optimizer = config.optimizer
    cells = [("role", "tensors", "parameters", "begins as", "spread", "peak rate", "decay", "what")]
    for row in _rows(config):
        settings = role_settings(optimizer, row.role)
        rate = optimizer.peak_learning_rate * settings["learning_rate_factor"]
        cells.append(
            (
                row.role.value,
                f"{row.tensors:,}",
                f"{row.parameters:,}",
                row.rule,
                row.spread,
                f"{rate:.4g}",
                f"{settings['weight_decay']:g}",
                ", ".join(row.names),
            )
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    return [
        f"by role of parameter ({_name_of_rules(config)}):",
        *(f"  {line}" for line in [*lines, _multipliers(config)]),
    ]


def _rows(config: RunConfig) -> list[_Row]:
    with torch.device("meta"):
        model = LanguageModel(config.model)
    roles = parameter_roles(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rows: dict[tuple[Role, str, float], _Row] = {}
    spreads: dict[tuple[object, ...], tuple[float, float]] = {}
    for module, parameter, fill in _filled(model, config):
        attribute = names[id(parameter)].rpartition(".")[2]
        role, shape = roles[names[id(parameter)]], parameter.shape
        key = (type(module), attribute, shape)  # what a fill depends on
        if key not in spreads:
            spreads[key] = _measured(shape, fill)
        mean, spread = spreads[key]
        rule = first_weights(
            config.init_scheme,
            role,
            fan_in=shape[-1],
            depth=config.model.num_layers,
            tied=config.model.tie_embeddings,
            into_residual=isinstance(module, ResidualProjection),
        )
        is_drawn = rule is None and spread > 0
        own = f"drawn by {type(module).__name__}" if is_drawn else f"{mean:.3g}"
        text = rule.text if rule else own
        # What layers draw themselves has little in common: a row for each that spreads its own way.
        row = rows.setdefault((role, text, spread if is_drawn else 0), _Row(role, text))
        what = attribute if rule is None else _PLACES.get(type(module), "")
        if what and what not in row.names:
            row.names.append(what)
        row.tensors += 1
        row.parameters += parameter.numel()
        row.spreads.append(spread)
    return sorted(rows.values(), key=lambda row: list(Role).index(row.role))


def _filled(
    model: LanguageModel, config: RunConfig
) -> Iterator[tuple[nn.Module, torch.Tensor, Fill]]:
    """Every parameter once, with the module that holds it and the way it is filled."""
    yield model.embedding, model.embedding.weight, embedding_fill(config.model)
    if not config.model.tie_embeddings:
        yield model.head, model.head.weight, head_fill(config.init_scheme)
    for module in model.modules():
        if module not in (model.embedding, model.head):
            for parameter, fill in module_fills(module, config.model, config.init_scheme):
                yield module, parameter, fill


def _measured(shape: torch.Size, fill: Fill) -> tuple[float, float]:
    """Mean and standard deviation of a sample: whole rows, since fills look at their length."""
    rest = math.prod(shape[1:])
    rows = min(shape[0], max(_SAMPLE // rest, 2))
    values = torch.empty(rows, *shape[1:], device="cpu")
    fill(values, torch.Generator().manual_seed(0))
    return values.mean().item(), values.std(correction=0).item()


def _multipliers(config: RunConfig) -> str:
    model = config.model
    return (
        f"multipliers: residual {model.residual_multiplier:.4g}, "
        f"logits {model.logit_multiplier:.4g}, attention {model.attention_scale:.4g}, "
        f"embedding {model.embedding_multiplier:.4g}"
    )


def _name_of_rules(config: RunConfig) -> str:
    """Which table all numbers agree with; a run may well follow none."""
    model = config.model
    for rules in RULES.values():
        expected = rules.multipliers(model.num_layers, model.head_dim)
        same_model = all(
            math.isclose(getattr(model, name), expected.get(name, 1.0))
            for name in ("residual_multiplier", "logit_multiplier", "attention_scale")
        )
        same_decay = all(
            role_settings(config.optimizer, role)["weight_decay"] == rules.weight_decay(role)
            for role in Role
        )
        same_rates = all(
            math.isclose(
                role_settings(config.optimizer, role)["learning_rate_factor"],
                rules.learning_rate_factor(role, model.num_layers),
            )
            for role in Role
        )
        if same_model and same_decay and same_rates and config.init_scheme is rules.init_scheme:
            return f"the rules of {rules.parametrization.value}"
    return "the rules of none of " + ", ".join(scheme.value for scheme in RULES)
