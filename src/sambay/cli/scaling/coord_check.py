"""Measure how activations and updates change with width and depth under SP, muP and muP++.

Models of several sizes take a few steps on one fixed batch, at a constant rate; the slopes of what
they compute against their size are printed and written, with pictures. Under a parametrisation
that carries hyperparameters over, they are flat.

examples:
  sambay scaling coord-check --out results/coordinates
  sambay scaling coord-check sambay+da --sweeps depth --depths 8,16,32 --init mup_published
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sambay.errors import ConfigError, nearest

if TYPE_CHECKING:
    from sambay.data.batches import Batch
    from sambay.studies.coordinates import CheckSettings, Point, Sweep

SWEEPS = ("width", "depth", "ladder")
PARAMETRIZATIONS = ("standard", "mup", "mup++")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `sambay scaling coord-check`."""
    parser.add_argument(
        "architecture", nargs="?", default="sambay", metavar="ARCHITECTURE",
        help="a preset of the family (sambay)",
    )  # fmt: skip
    parser.add_argument(
        "--sweeps", default=",".join(SWEEPS), metavar="WHAT,WHAT...",
        help="width (at the first depth), depth (at the first width) or ladder, both at once, "
        "the width in proportion to the depth (all three)",
    )  # fmt: skip
    parser.add_argument(
        "--widths", default="64,128,256,512", metavar="N,N...",
        help="hidden sizes (64,128,256,512)",
    )  # fmt: skip
    parser.add_argument(
        "--depths", default="8,16,24,32", metavar="N,N...",
        help="numbers of layers (8,16,24,32)",
    )  # fmt: skip
    parser.add_argument(
        "--parametrizations", default=",".join(PARAMETRIZATIONS), metavar="NAME,NAME...",
        help="standard, mup, mup++ (all three)",
    )  # fmt: skip
    parser.add_argument(
        "--init", default="mup_published", metavar="SCHEME",
        help="first weights under muP and muP++: mup_published (as the published table) or "
        "mup_released (which also divides the matrices into the residual stream)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="steps (10)")
    parser.add_argument(
        "--learning-rate", type=float, default=2e-3, metavar="X",
        help="constant rate at the smallest size (0.002)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="models per size (1)")
    parser.add_argument(
        "--data", type=Path, metavar="DIR",
        help="prepared data to take the batch from (seeded random tokens)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="rows (4)")
    parser.add_argument("--sequence-length", type=int, default=16, metavar="N", help="tokens (16)")
    parser.add_argument("--head-dim", type=int, default=16, metavar="N", help="of attention (16)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="cpu or cuda (auto)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (all)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write SWEEP.json, SWEEP.png and SWEEP.svg here"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; 0.

    Raises:
        ConfigError: an unknown name, a size that cannot be built, or a number below 1.
    """
    import sys

    from sambay.spec import Parametrization
    from sambay.studies.coordinates import Sweep, check, run_config

    settings, batch, data = _settings(args)
    names = _words("--parametrizations", args.parametrizations, PARAMETRIZATIONS)
    which = [Parametrization(name) for name in names]
    sweeps = _words("--sweeps", args.sweeps, SWEEPS)
    planned = {name: _points(Sweep(name), args) for name in sweeps}
    for points in planned.values():  # what cannot be built is said before anything is trained
        for point in points:
            run_config(settings, point, points[0], which[0], 0)
    print(f"{settings.architecture}: {settings.steps} steps on one batch of {data}", flush=True)
    for name, points in planned.items():
        readings = check(
            settings, points, which, batch,
            tell=lambda text, name=name: print(f"{name} {text}", file=sys.stderr, flush=True),
        )  # fmt: skip
        from sambay.studies.coordinates_report import SweepResult, table

        result = SweepResult(Sweep(name), settings, tuple(points), data, tuple(readings))
        print("", *table(result), sep="\n", flush=True)
        if args.out is not None:
            _write(result, args.out)
    return 0


def _settings(args: argparse.Namespace) -> tuple[CheckSettings, Batch, str]:
    """The settings, the batch, and where it is from in words."""
    import numpy as np

    from sambay.data.batches import read_batch
    from sambay.data.shards import TokenDataset
    from sambay.spec import InitScheme
    from sambay.studies.coordinates import CheckSettings, random_batch
    from sambay.train.config import Device

    numbers = ("steps", "seeds", "batch_size", "sequence_length", "head_dim", "threads")
    for name in numbers:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value} is too small; at least 1 works")
    if args.device not in tuple(Device):
        raise ConfigError(f"--device {args.device} is unknown; use auto, cpu or cuda")
    dataset = None if args.data is None else TokenDataset.open(args.data, "train")
    settings = CheckSettings(
        architecture=args.architecture,
        head_dim=args.head_dim,
        vocab_size=512 if dataset is None else dataset.vocab_size,
        sequence_length=args.sequence_length,
        batch_size=args.batch_size,
        steps=args.steps,
        learning_rate=args.learning_rate,
        seeds=tuple(range(args.seeds)),
        init_scheme=InitScheme(args.init),
        device=Device(args.device),
        threads=args.threads,
    )
    tokens = f"{args.batch_size} x {args.sequence_length}"
    if dataset is None:
        return settings, random_batch(settings), f"{tokens} random tokens"
    batch = read_batch(dataset, np.arange(args.batch_size), args.sequence_length)
    return settings, batch, f"{tokens} tokens of {args.data}"


def _points(sweep: Sweep, args: argparse.Namespace) -> list[Point]:
    """The sizes of a sweep in ascending order.

    Raises:
        ConfigError: a single size, which has no slope.
    """
    from sambay.studies.coordinates import Point

    widths, depths = _sizes("--widths", args.widths), _sizes("--depths", args.depths)
    name, sizes = ("--widths", widths) if sweep == "width" else ("--depths", depths)
    if len(sizes) < 2:
        raise ConfigError(f"{name} {sizes[0]}: a {sweep} sweep compares at least two sizes")
    if sizes[0] < 1:
        raise ConfigError(f"{name} {sizes[0]} is too small; at least 1 works")
    if sweep == "width":
        return [Point(width, depths[0]) for width in widths]
    if sweep == "depth":
        return [Point(widths[0], depth) for depth in depths]
    ratio, rest = divmod(widths[0], depths[0])
    if rest:
        raise ConfigError(
            f"--widths {widths[0]} is no multiple of --depths {depths[0]}; the ladder keeps the "
            "ratio of the smallest ones"
        )
    return [Point(ratio * depth, depth) for depth in depths]


def _words(option: str, text: str, known: Sequence[str]) -> list[str]:
    """The words of a list with commas, each once.

    Raises:
        ConfigError: none, or one that is unknown.
    """
    words = list(dict.fromkeys(one.strip() for one in text.split(",") if one.strip()))
    for word in words:
        if word not in known:
            raise ConfigError(f"{option} '{word}' is unknown{nearest(word, known)}")
    if not words:
        raise ConfigError(f"{option} '{text}' names nothing; write some of {', '.join(known)}")
    return words


def _sizes(option: str, text: str) -> list[int]:
    """The whole numbers of a list with commas, each once, in ascending order.

    Raises:
        ConfigError: something else is in the list, or nothing.
    """
    from sambay.cli.overrides import parse_value

    sizes = {parse_value(option, one.strip(), int) for one in text.split(",")}
    return sorted(sizes)


def _write(result: object, folder: Path) -> None:
    from sambay.files import write_json
    from sambay.plots.canvas import save
    from sambay.studies.coordinates_report import SweepResult, draw, to_json

    assert isinstance(result, SweepResult)
    write_json(folder / f"{result.sweep}.json", to_json(result))
    for suffix in (".png", ".svg"):
        save(draw(result), folder / f"{result.sweep}{suffix}")
    print(f"\nwritten to {folder / result.sweep}.json, .png and .svg", flush=True)
