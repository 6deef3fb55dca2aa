"""Fit L = A D^-b + C to the losses of a table, with intervals, and compare architectures.

Intervals are profile-likelihood and bootstrap ones that hold for five points; a comparison says
plainly when the data cannot tell two architectures apart. D is a column of the ladder's table, or
the column D of your own JSON or CSV table (columns D, L and, if needed, architecture and seed).

examples:
  sambay scaling fit runs/ladder/table.json --compare sambay samba+yoco --out runs/ladder
  sambay scaling fit losses.csv --noise 0.001
  sambay scaling fit --published --out docs/results
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from sambay.cli.scaling.fit_pictures import BEYOND, draw_pictures
from sambay.errors import ConfigError

if TYPE_CHECKING:
    from sambay.scaling.compare import Comparison
    from sambay.scaling.fit import Noise, PowerLaw
    from sambay.scaling.fit_points import Points
    from sambay.scaling.published import PublishedStudy

RESOURCES = ("flops", "paper-flops", "tokens", "parameters")
_UNITS = {
    "flops": "FLOPs", "paper-flops": "FLOPs by the paper's convention", "tokens": "tokens",
    "parameters": "parameters",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `sambay scaling fit`."""
    parser.add_argument("table", nargs="?", type=Path, metavar="TABLE", help=".json or .csv")
    parser.add_argument(
        "--published", action="store_true", help="fit the paper's own losses instead of a table"
    )
    parser.add_argument(
        "--x", choices=RESOURCES, default="flops", help="the table's column that is D (flops)"
    )
    parser.add_argument(
        "--compare", nargs=2, action="append", default=[], metavar=("A", "B"),
        help="two architectures; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--at", nargs="+", type=float, default=[], metavar="D",
        help="compare the predicted losses at these D too",
    )  # fmt: skip
    parser.add_argument(
        "--baseline", metavar="A", help="what the picture's differences refer to (the first)"
    )
    parser.add_argument(
        "--noise", default="auto", metavar="WORD",
        help="deviation of a run's loss in nats (a number), or auto: from each architecture's "
        "residuals; pooled: one for all architectures; seeds: between seeds (auto)",
    )  # fmt: skip
    parser.add_argument(
        "--leave-out", nargs="+", default=[], metavar="RUN", help="runs of the table not to use"
    )
    parser.add_argument("--level", type=float, default=0.95, metavar="P", help="(0.95)")
    parser.add_argument("--draws", type=int, default=4000, metavar="N", help="bootstrap (4000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the bootstrap (0)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write Markdown, JSON and pictures (PNG, SVG) here"
    )


def run(args: argparse.Namespace) -> int:
    """Fit, print, write; 0.

    Raises:
        ConfigError: options that exclude each other or lie outside their range.
        DataError: a table that cannot be fitted.
        MissingPackage: scipy or, with --out, matplotlib is not installed.
    """
    if args.published == (args.table is not None):
        raise ConfigError("give one of a TABLE and --published")
    if not 0.5 <= args.level < 1:
        raise ConfigError(f"--level {args.level:g} is out of range; use 0.5 to 0.999, such as 0.95")
    if args.draws < 200:
        raise ConfigError(f"--draws {args.draws} is too few for an interval; use at least 200")
    for D in args.at:
        if not (math.isfinite(D) and D > 0):
            raise ConfigError(f"--at {D:g}: D must be a positive number")
    if args.published:
        for name in ("compare", "at", "leave_out", "baseline"):
            if getattr(args, name):
                raise ConfigError(f"--{name.replace('_', '-')} has no effect with --published; "
                                  "leave it out")  # fmt: skip
        _published(args)
    else:
        _own_table(args)
    return 0


def _own_table(args: argparse.Namespace) -> None:
    from sambay.scaling.fit_points import Resource, choose, read_points

    table = read_points(args.table, Resource(args.x), args.leave_out)
    points = list(table.points)
    for name in [*(name for pair in args.compare for name in pair), args.baseline]:
        if name is not None:
            choose(points, name)
    text = _study(
        args, "fits", points, args.compare, args.baseline or points[0].name,
        [one.name for one in points], unit=_UNITS[args.x], title="Final validation loss",
        notes=table.left_out,
    )  # fmt: skip
    print(text)
    if args.out is not None:
        _write_text(args.out / "fits.md", f"# Fits of {args.table.name}\n\n{text}")


def _published(args: argparse.Namespace) -> None:
    from sambay.scaling.published import published_studies

    blocks = []
    studies = published_studies()
    for study in studies:
        block = [f"## {study.title}", f"{study.note[0].upper()}{study.note[1:]}."]
        block.append(_study(
            args, f"published_{study.key}", list(study.points), [study.compared], study.baseline,
            list(study.drawn), unit=study.unit, title=study.title, notes=_reproduction(study),
        ))  # fmt: skip
        blocks.append("\n\n".join(block))
    noise = next(found for study in studies if (found := study.rerun_noise()) is not None)
    blocks.append(
        "## With the noise between a run and its repetition\n\n"
        f"{noise.freedom:g} runs of 1B parameters were made a second time; their losses say that "
        f"a run's deviation is {noise.sigma:.5f} nats. With it instead of the residuals, and "
        "runs taken as independent:\n\n"
        + "\n".join(f"- {study.unit}: {line}"
                    for study in studies for line in _verdict_with(study, noise, args))
        + "\n"
    )  # fmt: skip
    text = "\n".join(blocks)
    print(text)
    if args.out is not None:
        _write_text(args.out / "published_fits_tables.md", f"# The paper's fits, again\n\n{text}")


def _reproduction(study: PublishedStudy) -> list[str]:
    """A line that says which printed constants come out again."""
    from sambay.scaling.fit import fit_power_law

    wrong = []
    for name, printed in study.printed.items():
        law = fit_power_law(study.curve(name))
        if any(
            round(value, 2) != constant
            for value, constant in zip((law.A, law.b, law.C), printed, strict=True)
        ):
            wrong.append(name)
    if wrong:
        return [f"Not as printed: {', '.join(wrong)}."]
    return [f"The constants of all {len(study.printed)} printed fits come out to the digits."]


def _verdict_with(study: PublishedStudy, noise: Noise, args: argparse.Namespace) -> list[str]:
    """What the compared pair's laws say at the largest run and beyond under another noise."""
    from sambay.scaling.compare import compare, verdict
    from sambay.scaling.fit import fit_power_law

    first, second = (fit_power_law(study.curve(name)).with_noise(noise) for name in study.compared)
    largest = float(first.x.max())
    made = compare(first, second, [largest, BEYOND * largest], draws=args.draws, seed=args.seed,
                   level=args.level)  # fmt: skip
    return [line for line in verdict(made) if not line.startswith("Measured")]


def _study(
    args: argparse.Namespace,
    stem: str,
    points: list[Points],
    pairs: list[list[str]] | list[tuple[str, str]],
    baseline: str,
    drawn: list[str],
    *,
    unit: str,
    title: str,
    notes: tuple[str, ...] | list[str],
) -> str:
    """Fit one table; write its JSON and picture if asked; its Markdown."""
    from sambay.files import write_json
    from sambay.scaling.compare import compare
    from sambay.scaling.fit_report import as_values, markdown, with_intervals

    laws = {law.name: law for law in _laws(args.noise, points)}
    largest = max(max(law.points.x) for law in laws.values())
    curves = [
        with_intervals(law, BEYOND * largest, draws=args.draws, seed=args.seed, level=args.level)
        for law in laws.values()
    ]
    made: dict[tuple[str, str], Comparison] = {}

    def compared(first: str, second: str) -> Comparison:
        if (first, second) not in made:
            made[first, second] = compare(
                laws[first], laws[second], sorted({largest, BEYOND * largest, *args.at}),
                draws=args.draws, seed=args.seed, level=args.level,
            )  # fmt: skip
        return made[first, second]

    comparisons = [compared(*pair) for pair in pairs]
    text = markdown(curves, comparisons, unit=unit, level=args.level, notes=notes)
    if args.out is not None:
        values = as_values(curves, comparisons, unit=unit, level=args.level, notes=notes)
        write_json(args.out / f"{stem}.json", values)
        by_name = {curve.law.name: curve for curve in curves}
        gaps = {name: compared(name, baseline) for name in drawn if name != baseline}
        caption = (
            f"bands: {100 * args.level:g} % bootstrap intervals; dashed: beyond the largest run"
        )
        own = [by_name[name] for name in drawn]
        draw_pictures(
            args.out, stem, own, gaps, baseline, comparisons, title, f"D, {unit}", caption
        )
    return text


def _laws(word: str, points: list[Points]) -> list[PowerLaw]:
    """The laws with the noise that was asked for."""
    from sambay.scaling.fit import Noise, NoiseSource, fit_power_law, pooled_noise

    laws = [fit_power_law(each) for each in points]
    if word == "auto":
        return laws
    if word == "pooled":
        noise = pooled_noise(laws)
        return [law.with_noise(noise) for law in laws]
    if word == "seeds":
        for law in laws:
            if law.seed_noise is None:
                raise ConfigError(f"--noise seeds: no size of {law.name} was run with two seeds; "
                                  "train one, or use auto or pooled")  # fmt: skip
        return [law.with_noise(law.seed_noise) for law in laws if law.seed_noise is not None]
    try:
        sigma = float(word)
    except ValueError:
        sigma = math.nan
    if not (math.isfinite(sigma) and sigma > 0):
        raise ConfigError(f"--noise {word} is unknown; use auto, pooled, seeds or a deviation in "
                          "nats, such as 0.001")  # fmt: skip
    return [law.with_noise(Noise(sigma, math.inf, NoiseSource.GIVEN)) for law in laws]


def _write_text(path: Path, text: str) -> None:
    from sambay.files import atomic_write

    with atomic_write(path) as file:
        file.write(text.encode())
    print(f"written to {path}")
