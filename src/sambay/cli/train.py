"""Train a model by a recipe.

RECIPE is a name (see below), FILE.py:FUNCTION, or the config.json of an earlier run. Running the
same command again continues from the last checkpoint; Ctrl-C saves one first.

examples:
  sambay train demo_sambay optimizer.peak_learning_rate=1e-3 --run-dir runs/first
  sambay train ladder architecture=sambay+da depth=8 --dry-run
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `sambay train`."""
    from sambay.cli.recipe_words import arguments_of
    from sambay.recipes.catalogue import RECIPES

    lines = []
    for name, recipe in RECIPES.items():
        lines.append(f"  {name:<16} {(recipe.__doc__ or '').splitlines()[0]}")
        arguments = [f"{one.name}={one.default}" for one in arguments_of(recipe).values()]
        lines += [f"  {'':<16} ({', '.join(arguments)})"] if arguments else []
    parser.epilog = "recipes, with their arguments:\n" + "\n".join(lines)
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.field=value",
        help="the recipe's arguments, and changes: depth=8 data.directory=my/data model.window=64",
    )
    parser.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="where the run lives (default: runs/RECIPE)"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print sizes, rules by role of parameter, memory and time by number "
        "of devices, and stop",
    )
    parser.add_argument(
        "--devices",
        default="1,8,64,1024",
        metavar="N,N...",
        help="for --dry-run: how many devices to print them for (1,8,64,1024)",
    )
    parser.add_argument(
        "--flops",
        metavar="X",
        help="for --dry-run: useful operations per second and device, for example 2e14 "
        "(30%% of an A100's peak, or of logging.peak_flops)",
    )
    parser.add_argument(
        "--export-only",
        action="store_true",
        help="make DIR/model from the last checkpoint of the run in DIR (or in RECIPE), and stop",
    )
    parser.add_argument(
        "--summary",
        action="store_true",
        help="write DIR/summary.html about the run in DIR (or in RECIPE), also while it goes on",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="remove the run that is in DIR and start again"
    )
    parser.add_argument(
        "--change-schedule",
        action="store_true",
        help="continue although `optimizer` or `schedule` differ from the checkpoint's",
    )


def run(args: argparse.Namespace) -> int:
    """The exit code: 0 when finished, 128 + signal number when stopped by one."""
    if os.environ.get("RANK", "0") != "0":  # of many processes the first speaks
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the life of the process
    if args.export_only:
        return _export(args)
    if args.summary:
        return _summarise(args)
    from sambay.cli.overrides import parse_value
    from sambay.cli.recipe_words import configured
    from sambay.train.data_checks import check_data, describe_data
    from sambay.train.plan import describe, outlook, without_effect
    from sambay.train.sinks import require_sinks

    name, config = configured(args.recipe, args.overrides)
    run_dir: Path = args.run_dir or Path("runs") / name
    if os.environ.get("RANK", "0") == "0":
        for line in without_effect(config):
            print(f"warning: {line}", file=sys.stderr)
    require_sinks(config.logging)
    facts = [("run", f"{name} in {run_dir}"), *describe(config)]
    if args.dry_run:
        from sambay.train.roles_table import roles_table

        devices = parse_value("--devices", args.devices, tuple[int, ...])
        lines = outlook(config, devices, parse_value("--flops", args.flops or "None", float | None))
        _print_table(facts)
        print("\n".join([*roles_table(config), *lines]))
        _print_table([describe_data(config, check_data(config))])
        return 0
    _print_table([*facts, describe_data(config, check_data(config))])

    from sambay.train.loop import train
    from sambay.train.resilience import TrainingDiverged

    try:
        outcome = train(config, run_dir, fresh=args.fresh, change_schedule=args.change_schedule)
    except TrainingDiverged:
        _write_page(run_dir)  # it shows how that came
        raise
    _write_page(run_dir)
    if outcome.stopped_by is not None:
        print(f"stopped at step {outcome.progress.step}; run the same command to continue")
        return 128 + outcome.stopped_by
    evaluation = outcome.evaluation
    if evaluation is None:
        print(f"already finished at step {outcome.progress.step}; --fresh starts again")
    else:
        print(
            f"finished {outcome.progress.step} steps, {outcome.progress.tokens:,} tokens: "
            f"validation loss {evaluation.loss:.4f} nats/token, "
            f"{evaluation.bits_per_byte:.4f} bits/byte on {evaluation.tokens:,} tokens"
        )
    print(f"model: {run_dir / 'model'}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from sambay.train.export import export_model

    run_dir: Path = args.run_dir or Path(args.recipe)
    print(f"model: {export_model(run_dir)}")
    return 0


def _summarise(args: argparse.Namespace) -> int:
    from sambay.train.summary import write_summary

    here, default = Path(args.recipe), Path("runs") / args.recipe
    run_dir: Path = args.run_dir or (here if here.is_dir() else default)
    print(f"summary: {write_summary(run_dir)}")
    return 0


def _write_page(run_dir: Path) -> None:
    """Write the summary of a run that has just ended; it is no reason to fail."""
    from sambay.errors import SambayError
    from sambay.train.summary import write_summary

    if os.environ.get("RANK", "0") != "0":
        return
    try:
        print(f"summary: {write_summary(run_dir)}", flush=True)
    except SambayError as error:
        print(f"warning: no summary was written: {error}", file=sys.stderr)


def _print_table(facts: list[tuple[str, str]]) -> None:
    for topic, text in facts:
        print(f"{topic:<13} {text}", flush=True)
