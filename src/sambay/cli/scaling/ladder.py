"""Train a ladder: several architectures in several depths (and seeds), into one table.

RECIPE is a name or FILE.py:FUNCTION, a function with the arguments architecture, depth and,
if it likes, seed. Every run is an ordinary run directory DIR/runs/ARCHITECTURE-dDEPTH-sSEED; those
that are done are skipped, those that were interrupted continue, and several commands may work on
the same DIR. What cannot be built is listed with the reason.

DIR/table.json and DIR/table.md are brought up to date after each run, also with more depths or
seeds added later; `sambay scaling fit` reads the first.

examples:
  sambay scaling ladder ladder --architectures transformer++,sambay --depths 8,12,16 --out study
  sambay scaling ladder my.py:small --architectures sambay --depths 8,12 --seeds 1,2 \\
      --processes 2 --minutes 90 --out study batch.micro_batch_size=8

exit codes: 0 all runs are done, 1 some failed or diverged, 3 some are left because the time was
over, 2 nothing was started because of a mistake, 128 + signal number when stopped by one.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sambay.studies.ladder import Outcome, Runner
    from sambay.studies.members import Build, Member
    from sambay.train.config import RunConfig

_SOME_FAILED, _SOME_LEFT = 1, 3
_ARGUMENTS = {"architecture": "--architectures", "depth": "--depths", "seed": "--seeds"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `sambay scaling ladder`."""
    from sambay.studies.members import Order

    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="name=value",
        help="other arguments of the recipe, and changes to all runs: model.window=64",
    )
    parser.add_argument(
        "--architectures", metavar="A,B...", help="by name (the recipe's own: one architecture)"
    )
    parser.add_argument("--depths", metavar="N,N...", help="numbers of layers (the recipe's own)")
    parser.add_argument("--seeds", metavar="N,N...", help="one run for each (the recipe's own)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where it all lives")
    parser.add_argument(
        "--devices", default="", metavar="D,D...", help="cpu, cuda or cuda:0,cuda:1 (the recipe's)"
    )
    parser.add_argument(
        "--processes", default="1", metavar="N", help="runs at once, on each device (1)"
    )
    parser.add_argument(
        "--threads",
        metavar="N",
        help="CPU threads of each run (the recipe's, or the cores divided among the processes)",
    )
    parser.add_argument(
        "--minutes", metavar="M", help="after so long save, stop, and say how to go on"
    )
    parser.add_argument(
        "--order",
        default=Order.COST.value,
        metavar="KIND",
        help="which run is next: cost (cheap ones, then low seeds; default), seed (all of the "
        "first seed before the next), given",
    )
    parser.add_argument(
        "--retry", action="store_true", help="also try again what diverged the last time"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan, and stop"
    )


def run(args: argparse.Namespace) -> int:
    """The exit code: 0 when all runs are done; others as the help says."""
    from sambay.cli.overrides import parse_value
    from sambay.errors import ConfigError
    from sambay.studies.members import Order, expand
    from sambay.studies.queue import slots

    order = parse_value("--order", args.order, Order)
    processes = _positive("--processes", args.processes)
    devices = [one.strip() for one in args.devices.split(",") if one.strip()]
    build, lists = _plan(args)
    members = expand(build, *lists)
    minutes = parse_value("--minutes", args.minutes or "None", float | None)
    if minutes is not None and minutes <= 0:
        raise ConfigError(f"--minutes = {minutes:g}; it must be greater than 0")
    if args.threads is not None:
        threads = _positive("--threads", args.threads)
    else:
        is_open = all(one.config is None or one.config.threads is None for one in members)
        shares_cores = is_open and processes > 1 and not any("cuda" in one for one in devices)
        threads = max(1, (os.cpu_count() or 1) // processes) if shares_cores else None

    from sambay.studies import ladder

    places = slots(devices, processes, threads)
    runner = ladder.Runner(
        members, args.out, places, order=order, minutes=minutes, retry=args.retry
    )
    if args.dry_run:
        _print_plan(runner, members)
        return 0
    outcome = runner.run()
    return _conclude(outcome, args.out)


def _plan(args: argparse.Namespace) -> tuple[Build, tuple[list[str], list[int], list[int]]]:
    """How a run is built, and the architectures, depths and seeds to build."""
    import inspect

    from sambay.cli.recipe_words import arguments_of, configured
    from sambay.errors import ConfigError
    from sambay.recipes.catalogue import open_recipe

    accepted = arguments_of(open_recipe(args.recipe)[1])
    for word in args.words:
        name = word.partition("=")[0].strip()
        if name in _ARGUMENTS:
            raise ConfigError(f"{word} would fix what a ladder varies; use {_ARGUMENTS[name]}")
    for name in ("architecture", "depth"):
        if name not in accepted:
            raise ConfigError(
                f"recipe '{args.recipe}' has no argument {name}; a ladder needs a function of "
                "architecture and depth, for example `ladder`"
            )

    def listed(name: str) -> list[str]:
        option = _ARGUMENTS[name]
        text = getattr(args, option.removeprefix("--"))
        if text is None:
            default = accepted[name].default if name in accepted else 1
            if default is inspect.Parameter.empty:
                raise ConfigError(f"recipe '{args.recipe}' has no {name} of its own; give {option}")
            text = str(default)
        values = [one.strip() for one in text.split(",") if one.strip()]
        if not values:
            raise ConfigError(f"{option} '{text}' names nothing; write one or more, with commas")
        return values

    def build(architecture: str, depth: int, seed: int) -> RunConfig:
        varied = [f"architecture={architecture}", f"depth={depth}", f"seed={seed}"]
        return configured(args.recipe, [*varied, *args.words])[1]

    depths = [_positive("--depths", one) for one in listed("depth")]
    seeds = [_positive("--seeds", one, minimum=0) for one in listed("seed")]
    return build, (listed("architecture"), depths, seeds)


def _positive(option: str, text: str, minimum: int = 1) -> int:
    from sambay.cli.overrides import parse_value
    from sambay.errors import ConfigError

    value: int = parse_value(option, text, int)
    if value < minimum:
        raise ConfigError(f"{option} = {value}; it must be a whole number >= {minimum}")
    return value


def _print_plan(runner: Runner, members: list[Member]) -> None:
    """Every run with its size and state, and what cannot be built with the reason."""
    total = 0.0
    for member in [*runner.ordered, *(one for one in members if one.config is None)]:
        row = runner.ledger.row(member)
        if member.config is None:
            print(f"{member.name:<28} cannot be built: {member.reason}")
            continue
        total += member.flops
        print(
            f"{member.name:<28} width {row['width']:<5} {row['parameters']:>13,} parameters  "
            f"{row['tokens']:>15,} tokens  {member.flops:.2e} FLOPs  {row['state']}"
        )
    print(f"{'all':<28} {total:.2e} FLOPs")


def _conclude(outcome: Outcome, out: Path) -> int:
    """Say how it ended; the exit code."""
    facts = [f"{outcome.finished} finished"]
    for number, what in (
        (outcome.failed, "failed or diverged"),
        (outcome.pending, "not finished"),
        (outcome.unbuildable, "cannot be built"),
    ):
        facts += [f"{number} {what}"] if number else []
    print(f"runs: {', '.join(facts)}; table: {out / 'table.md'}")
    if outcome.pending:
        print("run the same command again to go on")
    if outcome.stopped_by is not None:
        return 128 + outcome.stopped_by
    if outcome.failed:
        return _SOME_FAILED
    return _SOME_LEFT if outcome.pending else 0
