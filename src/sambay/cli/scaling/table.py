"""Print sizes, tokens, rates and FLOPs of architectures at several depths.

Without --exact the published shapes: hidden size = published aspect ratio x depth. With --exact the
hidden size whose exact count is nearest to that of the Transformer++ of the same depth, or to
--target. A size that cannot be built stands in the table with the reason.

examples:
  sambay scaling table
  sambay scaling table --exact --architectures sambay,sambay+da --depths 8,16,24 --markdown
  sambay scaling table --exact --base-aspect 16 num_heads=4 num_kv_heads=2 head_dim=16
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from sambay.spec import ModelConfig, Parametrization

if TYPE_CHECKING:
    from sambay.scaling.horizon import Horizon

_COLUMNS = (
    "architecture", "depth", "hidden", "parameters", "with embeddings", "published", "deviation",
    "tokens", "batch", "rate", "of matrices", "decay", "FLOPs", "as published",
)  # fmt: skip
_LEGEND = (
    "parameters: exact, without and with embeddings; published: by the paper's formula, without",
    "deviation: of the exact count from the published one, or from the aim of --exact",
    "rate, decay: of vector-like parameters, and of matrices",
    "FLOPs: exact, in rows of --length; as published: 6 N T of the Transformer++ of the depth",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `sambay scaling table`."""
    parser.add_argument(
        "fields",
        nargs="*",
        metavar="field=value",
        help="fields of the model that replace those of all architectures: head_dim=64 window=64",
    )
    parser.add_argument(
        "--architectures",
        default="transformer++,samba+yoco,sambay,sambay+da",
        metavar="A,B...",
        help="names of presets, or `all` (%(default)s)",
    )
    parser.add_argument(
        "--depths",
        default="8,12,16,20,24",
        metavar="N,N...",
        help="numbers of layers (%(default)s)",
    )
    parser.add_argument(
        "--exact", action="store_true", help="solve for the hidden size by exact counts"
    )
    parser.add_argument(
        "--target", metavar="N", help="for --exact: the number of parameters to reach at all depths"
    )
    parser.add_argument(
        "--base-aspect",
        metavar="N",
        help="for --exact: hidden size per layer of the Transformer++ (128)",
    )
    parser.add_argument(
        "--multiple", metavar="N", help="for --exact: hidden sizes are multiples of it (2)"
    )
    parser.add_argument(
        "--with-embeddings", action="store_true", help="for --exact: count embeddings too"
    )
    parser.add_argument(
        "--parametrization", default="mup++", metavar="NAME", help="standard, mup or mup++ (mup++)"
    )
    parser.add_argument(
        "--horizon",
        default="constant",
        metavar="NAME",
        help="what changes with the tokens: constant (nothing), batch or rate",
    )
    parser.add_argument(
        "--length", default="4096", metavar="N", help="tokens in a row, for the FLOPs (4096)"
    )
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")


def run(args: argparse.Namespace) -> int:
    """Prints the table; the exit code is 0 also where some sizes cannot be built.

    Raises:
        ConfigError: an option that means nothing, or no size can be built (the first reason).
    """
    from sambay.cli.overrides import parse_value
    from sambay.errors import ConfigError, nearest
    from sambay.scaling.horizon import Horizon
    from sambay.spec import presets

    for option in ("target", "base_aspect", "multiple", "with_embeddings"):
        if getattr(args, option) and not args.exact:
            name = option.replace("_", "-")
            raise ConfigError(f"--{name} has no effect without --exact; add it")
    length = parse_value("--length", args.length, int)
    if length < 1:
        raise ConfigError(f"--length = {length}; it must be 1 or more")
    depths = parse_value("--depths", args.depths, tuple[int, ...])
    names = presets.NAMES if args.architectures == "all" else args.architectures.split(",")
    for name in names:
        if name not in presets.NAMES:
            raise ConfigError(f"preset '{name}' does not exist{nearest(name, presets.NAMES)}")
    request = _Request(
        parametrization=Parametrization(args.parametrization),
        horizon=parse_value("--horizon", args.horizon, Horizon),
        length=length,
        fields=_fields(args.fields),
        solver={
            "target": parse_value("--target", args.target or "None", int | None),
            "base_aspect_ratio": parse_value("--base-aspect", args.base_aspect or "128", int),
            "multiple": parse_value("--multiple", args.multiple or "2", int),
            "embeddings": args.with_embeddings,
        }
        if args.exact
        else None,
    )
    rows, failures = [], []
    for depth in depths:
        for name in names:
            try:
                rows.append(_row(name, depth, request))
            except ConfigError as error:
                if len(depths) * len(names) == len(failures) + 1:
                    raise
                rows.append((name, str(depth), *["-"] * (len(_COLUMNS) - 2)))
                failures.append(f"{name} at depth {depth} cannot be built: {error}")
    print("\n".join(_lines(rows, args.markdown)))
    notes = [*failures, *_LEGEND]
    print("\n".join(["", *(f"- {note}" for note in notes)] if args.markdown else notes))
    return 0


@dataclass(frozen=True)
class _Request:
    """What was asked for, besides architectures and depths."""

    parametrization: Parametrization
    horizon: Horizon
    length: int
    fields: dict[str, Any]
    solver: dict[str, Any] | None


def _fields(words: Sequence[str]) -> dict[str, Any]:
    """Model fields of `field=value` words, typed as `ModelConfig` declares them."""
    from sambay.cli.overrides import parse_value
    from sambay.errors import ConfigError, nearest

    hints = get_type_hints(ModelConfig)
    fields: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in hints:
            raise ConfigError(f"'{word}' is no field=value of a model{nearest(name, hints)}")
        fields[name] = parse_value(name, value, hints[name])
    return fields


def _row(name: str, depth: int, request: _Request) -> tuple[str, ...]:
    from sambay.scaling.horizon import published_flops, run_scale, tokens_for
    from sambay.scaling.iso import nominal_parameters, same_size
    from sambay.spec import presets
    from sambay.spec.footprint import parameter_count, training_flops

    scheme, fields = request.parametrization, request.fields
    nominal = deviation = None
    if request.solver is not None:
        size = same_size(name, depth, parametrization=scheme, **request.solver, **fields)
        config, deviation = size.config, size.deviation
    else:
        config = presets.build(name, depth, parametrization=scheme, **fields)
    count = parameter_count(config, embeddings=False)
    if request.solver is None and not fields:
        nominal = nominal_parameters(name, depth)
        deviation = count / nominal - 1
    tokens = tokens_for(count if nominal is None else nominal)
    scale = run_scale(depth, tokens, parametrization=scheme, horizon=request.horizon)
    flops = training_flops(config, request.length) / request.length * tokens
    return (
        name,
        str(depth),
        f"{config.hidden_size:,}",
        _millions(count),
        _millions(parameter_count(config)),
        "-" if nominal is None else _millions(nominal),
        "-" if deviation is None else f"{deviation:+.2%}",
        f"{tokens / 1e9:,.1f} B" if tokens >= 1e9 else f"{tokens / 1e6:,.1f} M",
        f"{scale.batch_tokens:,}",
        f"{scale.peak_learning_rate:.3g}",
        f"{scale.peak_learning_rate * scale.matrix_learning_rate_factor:.3g}",
        f"{scale.vector_weight_decay:.3g}, {scale.weight_decay:.3g}",
        f"{flops:.4g}",
        "-" if nominal is None else f"{published_flops(depth):.5g}",
    )


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M"


def _lines(rows: Sequence[Sequence[str]], markdown: bool) -> list[str]:
    if markdown:
        rule = ["---"] * 2 + ["---:"] * (len(_COLUMNS) - 2)
        return ["| " + " | ".join(cells) + " |" for cells in (_COLUMNS, rule, *rows)]
    widths = [max(len(cells[at]) for cells in (_COLUMNS, *rows)) for at in range(len(_COLUMNS))]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in (_COLUMNS, *rows)
    ]
