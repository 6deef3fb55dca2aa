"""Write a model folder with random weights, tensor by tensor: any size, little memory.

PRESET is phi4-mini-flash (the released 3.85 B model) or a member of the family (see below), which
also needs --depth. The same seed gives the same weights. With --layout official the folder has the
tensor names of the released checkpoint.

examples:
  sambay init phi4-mini-flash flash --layout official
  sambay init sambay small --depth 8 hidden_size=256 vocab_size=8000
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any, get_type_hints

from sambay.errors import ConfigError, nearest
from sambay.spec import InitScheme, ModelConfig, presets

FLASH = "phi4-mini-flash"
_MAX_DEPTH = 4096
_PREFIX = "model."  # as in the overrides of `sambay train`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `sambay init`."""
    parser.epilog = f"presets:\n  {FLASH}, {', '.join(presets.NAMES)}"
    parser.add_argument("preset", metavar="PRESET")
    parser.add_argument("out", metavar="OUT", help="the new folder")
    parser.add_argument(
        "overrides", nargs="*", metavar="field=value", help="changes, for example window=64"
    )
    parser.add_argument(
        "--depth", type=int, metavar="N", help=f"layers, a multiple of 4 ({FLASH}: 32)"
    )
    parser.add_argument(
        "--layout", choices=("native", "official"), default="native", help="of the folder (native)"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of weights (bfloat16)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights (0)")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="largest file, as 500MB (5GB)"
    )


def run(args: argparse.Namespace) -> None:
    """Write the folder and say what is in it.

    Raises:
        SambayError: a configuration that cannot work or does not fit the layout, a folder that is
            there already, a disk that is too small.
    """
    config = build_config(args.preset, args.depth, parse_fields(args.overrides))
    if args.seed < 0:
        raise ConfigError(f"--seed {args.seed} is negative; give 0 or more")
    import torch

    from sambay.hf.random_checkpoint import (
        Layout,
        plan_random,
        require_free_place,
        write_random_checkpoint,
    )
    from sambay.model.weights_writer import parse_size

    max_shard_bytes = parse_size(args.max_shard_size)
    options: dict[str, Any] = {
        "dtype": getattr(torch, args.dtype),
        "seed": args.seed,
        "scheme": InitScheme.STANDARD if args.preset == FLASH else InitScheme.MUP_RELEASED,
    }
    out, layout = Path(args.out), Layout(args.layout)
    _, plans = plan_random(config, layout, **options)
    total = sum(plan.nbytes for plan in plans)
    require_free_place(out, total)
    num_parameters = sum(math.prod(plan.shape) for plan in plans)
    print(f"{args.preset}: {config.layer_pattern}, hidden size {config.hidden_size}", flush=True)
    print(f"{num_parameters:,} parameters, {len(plans)} tensors, {total:,} bytes", flush=True)
    began = time.monotonic()
    progress = Progress(total)
    write_random_checkpoint(
        out, config, layout, **options, max_shard_bytes=max_shard_bytes, advance=progress.advance
    )
    progress.close()
    seconds = time.monotonic() - began
    print(f"wrote {out} ({layout}, {args.dtype}, seed {args.seed}) in {seconds:.1f} s")


def build_config(preset: str, depth: int | None, fields: dict[str, Any]) -> ModelConfig:
    """The configuration of a preset at a depth, with some fields replaced.

    Raises:
        ConfigError: an unknown preset, a depth that is missing or impossible, or a bad field.
    """
    if preset == FLASH:
        if depth is not None:
            _check_depth(depth)
            if "layer_pattern" in fields:
                raise ConfigError("--depth and layer_pattern exclude each other; leave one out")
            fields = {"layer_pattern": presets.PRESETS["sambay+da"].pattern(depth)} | fields
        if "head_dim" in fields:
            fields = {"attention_scale": 1 / math.sqrt(fields["head_dim"])} | fields
        return presets.phi4_mini_flash(**fields)
    if preset not in presets.NAMES:
        known = (FLASH, *presets.NAMES)
        raise ConfigError(f"preset '{preset}' does not exist{nearest(preset, known)}")
    if depth is None:
        raise ConfigError(f"--depth is missing; '{preset}' is a shape at any depth, try --depth 8")
    _check_depth(depth)
    return presets.build(preset, depth, **fields)


def parse_fields(overrides: list[str]) -> dict[str, Any]:
    """The values of `field=value` texts by field, typed; `model.field=value` is the same.

    Raises:
        ConfigError: not of that form, an unknown field, one given twice, or another type.
    """
    from sambay.cli.overrides import parse_value

    hints = get_type_hints(ModelConfig)
    fields: dict[str, Any] = {}
    for text in overrides:
        path, equals, value = text.partition("=")
        name = path.strip().removeprefix(_PREFIX)
        if not equals:
            raise ConfigError(f"'{text}' is not an override; write field=value such as window=64")
        if name not in ModelConfig.__dataclass_fields__:
            raise ConfigError(f"unknown field '{name}'{nearest(name, hints)}")
        if name in fields:
            raise ConfigError(f"{name} is given twice; leave one of them out")
        fields[name] = parse_value(name, value.strip(), hints[name])
    return fields


def _check_depth(depth: int) -> None:
    if not 4 <= depth <= _MAX_DEPTH or depth % 4:
        raise ConfigError(f"--depth {depth}; layers repeat in fours, choose 4, 8, 12, ...")


class Progress:
    """A bar on a terminal, a line every few seconds elsewhere: share, rate and time left."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._began = self._shown = time.monotonic()
        self._is_terminal = sys.stderr.isatty()

    def advance(self, count: int) -> None:
        """Count bytes that were written."""
        self._done += count
        now = time.monotonic()
        if now - self._shown < (0.2 if self._is_terminal else 5.0):
            return
        self._shown = now
        rate = self._done / (now - self._began)
        left = (self._total - self._done) / rate
        self._write(
            f"{self._done / self._total:4.0%}  {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB"
            f"  {rate / 1e6:.0f} MB/s  {left:.0f} s left"
        )

    def close(self) -> None:
        """End the line of the bar."""
        if self._is_terminal:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def _write(self, text: str) -> None:
        sys.stderr.write(f"\r\x1b[K{text}" if self._is_terminal else f"{text}\n")
        sys.stderr.flush()
