"""Sweep the learning rate at several depths and show where the best one is.

RECIPE is a name or FILE.py:FUNCTION, a function of depth and, if it likes, parametrization and
seed; or an architecture, which stands for `small_ladder architecture=...`. Each depth is trained
with every factor of the rate that the recipe gives it. Every run is an ordinary run directory
DIR/runs/PARAMETRIZATION-dDEPTH-xFACTOR-sSEED; those that are done are skipped, those that were
interrupted continue, and several commands may work on the same DIR. Runs that diverge are recorded.

DIR/transfer.json, transfer.md, transfer.png and transfer.svg hold the losses, the best rate of each
depth (of the grid, and by a parabola), how far it moves, and the verdict.

examples:
  sambay scaling transfer sambay data.directory=data/stdlib --depths 8,12,16 --out study
  sambay scaling transfer my.py:small --parametrizations mup++,standard --processes 2 --out study

exit codes: 0 all runs are done or diverged, 1 some failed, 3 some are left because the time was
over, 2 nothing was started because of a mistake, 128 + signal number when stopped by one.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sambay.errors import ConfigError

if TYPE_CHECKING:
    from sambay.studies.ladder import Outcome, Runner
    from sambay.studies.transfer import SweepMember

_SOME_FAILED, _SOME_LEFT = 1, 3
_SMALL = "small_ladder"
_VARIED = {"depth": "--depths", "parametrization": "--parametrizations", "seed": "--seeds"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `sambay scaling transfer`."""
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="name=value",
        help="other arguments of the recipe, and changes to all runs: model.window=64",
    )
    parser.add_argument("--depths", default="8,12,16", metavar="N,N...", help="layers (8,12,16)")
    parser.add_argument(
        "--factors", default="0.125,0.25,0.5,1,2,4,8", metavar="X,X...",
        help="of the recipe's learning rate (0.125,0.25,0.5,1,2,4,8)",
    )  # fmt: skip
    parser.add_argument(
        "--parametrizations", metavar="P,P...",
        help="standard, mup, mup++ (mup++; a recipe without this argument: its own)",
    )  # fmt: skip
    parser.add_argument("--seeds", metavar="N,N...", help="one run for each (the recipe's own)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where it all lives")
    parser.add_argument(
        "--loss", default="validation", metavar="KIND",
        help="which loss is judged: validation, at the end, or training, the mean over the last "
        "tenth of the steps (validation)",
    )  # fmt: skip
    parser.add_argument(
        "--devices", default="", metavar="D,D...", help="cpu, cuda or cuda:0,cuda:1 (the recipe's)"
    )
    parser.add_argument(
        "--processes", default="1", metavar="N", help="runs at once, on each device (1)"
    )
    parser.add_argument("--threads", metavar="N", help="CPU threads of each run (1)")
    parser.add_argument(
        "--minutes", metavar="M", help="after so long save, stop, and say how to go on"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan, and stop"
    )


def run(args: argparse.Namespace) -> int:
    """The exit code: 0 when all runs are done; others as the help says.

    Raises:
        SambayError: a mistake, before anything is started.
    """
    from sambay.cli.overrides import parse_value
    from sambay.studies import ladder
    from sambay.studies.queue import slots
    from sambay.studies.transfer import Judged, collect
    from sambay.studies.transfer_report import page, write

    judged = parse_value("--loss", args.loss, Judged)
    members = _members(args)
    minutes = None if args.minutes is None else parse_value("--minutes", args.minutes, float)
    devices = [one.strip() for one in args.devices.split(",") if one.strip()]
    threads = 1 if args.threads is None else _whole("--threads", args.threads)
    places = slots(devices, _whole("--processes", args.processes), threads)
    runner = ladder.Runner(members, args.out, places, minutes=minutes)
    if args.dry_run:
        _print_plan(runner, members)
        return 0
    outcome = runner.run()
    result = collect(members, outcome.rows, args.out, judged)
    print(*page(result), sep="\n")
    for member in members:
        if member.config is None and member.factor == members[0].factor:
            print(f"depth {member.depth} cannot be built: {member.reason}")
    print(f"written to {', '.join(path.name for path in write(result, args.out))} in {args.out}")
    return _conclude(outcome, members)


def _members(args: argparse.Namespace) -> list[SweepMember]:
    from sambay.cli.overrides import parse_value
    from sambay.cli.recipe_words import arguments_of, configured
    from sambay.recipes.catalogue import RECIPES, open_recipe
    from sambay.spec import Parametrization, presets
    from sambay.studies.transfer import expand
    from sambay.train.config import RunConfig

    recipe, words = args.recipe, list(args.words)
    if recipe in presets.NAMES and recipe not in RECIPES:
        recipe, words = _SMALL, [f"architecture={recipe}", *words]
    accepted = arguments_of(open_recipe(recipe)[1])
    for word in words:
        name = word.partition("=")[0].strip()
        if name in _VARIED:
            raise ConfigError(f"{word} would fix what a sweep varies; use {_VARIED[name]}")
        if name == "optimizer.peak_learning_rate":
            raise ConfigError(f"{word} would give all depths one rate; use --factors")
    if "depth" not in accepted:
        raise ConfigError(
            f"recipe '{recipe}' has no argument depth; a sweep needs a function of depth, for "
            f"example `{_SMALL}`"
        )
    for name in ("parametrization", "seed"):
        if getattr(args, _VARIED[name].removeprefix("--")) is not None and name not in accepted:
            raise ConfigError(f"{_VARIED[name]}: recipe '{recipe}' has no argument {name}")

    def listed(option: str, given: str | None, kind: Any, default: Any) -> tuple[Any, ...]:
        if given is None:
            return (default,)
        return tuple(parse_value(option, one.strip(), kind) for one in given.split(","))

    def build(parametrization: Parametrization, depth: int, seed: int) -> RunConfig:
        values = {"parametrization": parametrization.value, "depth": depth, "seed": seed}
        varied = [f"{name}={value}" for name, value in values.items() if name in accepted]
        return configured(recipe, [*varied, *words])[1]

    names = listed("--parametrizations", args.parametrizations, str, Parametrization.MUP_PLUS_PLUS)
    default_seed = accepted["seed"].default if "seed" in accepted else 0
    architecture = next(
        (word.partition("=")[2].strip() for word in words if word.startswith("architecture=")),
        str(accepted["architecture"].default) if "architecture" in accepted else recipe,
    )
    return expand(
        build,
        architecture,
        [Parametrization(name) for name in names],
        [_at_least_one("--depths", one) for one in listed("--depths", args.depths, int, None)],
        listed("--factors", args.factors, float, None),
        listed("--seeds", args.seeds, int, default_seed),
    )


def _whole(option: str, text: str) -> int:
    from sambay.cli.overrides import parse_value

    return _at_least_one(option, parse_value(option, text, int))


def _at_least_one(option: str, value: int) -> int:
    if value < 1:
        raise ConfigError(f"{option} = {value}; it must be a whole number >= 1")
    return value


def _print_plan(runner: Runner, members: list[SweepMember]) -> None:
    for member in [*runner.ordered, *(one for one in members if one.config is None)]:
        if member.config is None:
            print(f"{member.name:<28} cannot be built: {member.reason}")
            continue
        row = runner.ledger.row(member)
        print(
            f"{member.name:<28} rate {row['peak_learning_rate']:<9.3g} "
            f"{row['parameters']:>13,} parameters  {row['tokens']:>15,} tokens  {row['state']}"
        )


def _conclude(outcome: Outcome, members: list[SweepMember]) -> int:
    from sambay.studies.results import FAILED

    if outcome.pending:
        print(f"{outcome.pending} runs are not finished; run the same command again to go on")
    if outcome.stopped_by is not None:
        return 128 + outcome.stopped_by
    # A run that diverged is a result of a sweep, not a failure of it.
    if any(outcome.rows[member.name]["state"] == FAILED for member in members):
        return _SOME_FAILED
    return _SOME_LEFT if outcome.pending else 0
