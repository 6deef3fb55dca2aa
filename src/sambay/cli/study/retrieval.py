"""Train small models alike, and ask all of them for phone numbers, needles and chains of values.

Everything lives in DIR: the data, the runs, every answer, and at the end DIR/study.md with tables
and pictures. Whatever stops it, the same command goes on where it was. It takes about two hours on
two processors; --smaller takes minutes and shows the way of it, not a result. What came out of it
once is in docs/results/small_retrieval.md.

examples:
  sambay study retrieval --out runs/retrieval --processes 2
  sambay study retrieval --smaller --out runs/retrieval-smaller
  sambay study retrieval --contenders sambay,transformer++ --seeds 1,2 --out runs/pair

exit codes: 0 done, 2 a mistake, 4 some runs failed, 5 the time was over, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sambay.errors import ConfigError

if TYPE_CHECKING:
    from sambay.studies.ladder import Outcome
    from sambay.studies.members import Member
    from sambay.studies.queue import Slot
    from sambay.studies.retrieval import Scale

_SOME_FAILED, _SOME_LEFT, _INTERRUPTED = 4, 5, 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `sambay study retrieval`."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where it all lives")
    parser.add_argument("--smaller", action="store_true", help="minutes instead of hours")
    parser.add_argument(
        "--contenders", metavar="A,B...",
        help="some of: transformer++, transformer-ls, samba+yoco, sambay, sambay+da, s-gdny, "
        "sambay-w16, sambay-w64, sambay-chains, transformer++-chains (all; four with --smaller)",
    )  # fmt: skip
    parser.add_argument("--seeds", default="1", metavar="N,N...", help="a run for each (1)")
    parser.add_argument("--tokens", metavar="N", help="of each run (the recipe's)")
    parser.add_argument(
        "--text", type=Path, metavar="DIR", help="real text (Python's standard library)"
    )
    parser.add_argument("--processes", default="1", metavar="N", help="runs trained at once (1)")
    parser.add_argument("--threads", metavar="N", help="CPU threads of each run (1)")
    parser.add_argument(
        "--minutes", metavar="M", help="train for so long, save, and report what there is"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan, and stop")


def run(args: argparse.Namespace) -> int:
    """Write the data, train, ask, report; the exit code as the help says.

    Raises:
        SambayError: a mistake, before anything is started.
    """
    from sambay.studies.queue import slots
    from sambay.studies.retrieval import DATA, members

    scale = _scale(args)
    seeds = [_whole("--seeds", one, 0) for one in args.seeds.split(",")]
    places = slots(
        [], _whole("--processes", args.processes), _whole("--threads", args.threads or "1")
    )
    minutes = None if args.minutes is None else _whole("--minutes", args.minutes)
    runs = members(scale, seeds, args.out / DATA)
    if args.dry_run:
        _print_plan(runs)
        return 0
    _write_data(args, scale)
    outcome = _train(runs, args.out, places, minutes)
    if outcome.stopped_by is not None:
        return 128 + outcome.stopped_by
    try:
        _ask_and_report(runs, scale, outcome, args.out)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return _INTERRUPTED
    if outcome.pending:
        print(f"{outcome.pending} runs are not finished; run the same command again to go on")
    return _SOME_FAILED if outcome.failed else _SOME_LEFT if outcome.pending else 0


def _scale(args: argparse.Namespace) -> Scale:
    import dataclasses

    from sambay.studies.retrieval import SMALLER, Scale, chosen_contenders

    scale = SMALLER if args.smaller else Scale()
    if args.contenders is not None:
        labels = [one.strip() for one in args.contenders.split(",") if one.strip()]
        if not labels:
            raise ConfigError(f"--contenders '{args.contenders}' names nothing; write some")
        scale = dataclasses.replace(scale, contenders=chosen_contenders(labels))
    if args.tokens is not None:
        scale = dataclasses.replace(scale, tokens=_whole("--tokens", args.tokens))
    return scale


def _write_data(args: argparse.Namespace, scale: Scale) -> None:
    from sambay.recipes.small_retrieval import VOCABULARY
    from sambay.studies.retrieval import DATA
    from sambay.studies.retrieval_corpus import CorpusSettings, write_corpus

    settings = CorpusSettings(VOCABULARY, args.text, documents=scale.documents)
    write_corpus(args.out / DATA, settings, tell=lambda line: print(line, flush=True))


def _train(runs: list[Member], out: Path, places: list[Slot], minutes: int | None) -> Outcome:
    from sambay.studies import ladder
    from sambay.studies.members import Order

    return ladder.Runner(runs, out, places, order=Order.GIVEN, minutes=minutes).run()


def _ask_and_report(runs: list[Member], scale: Scale, outcome: Outcome, out: Path) -> None:
    from sambay.studies.progress import Display
    from sambay.studies.retrieval import ask_all
    from sambay.studies.retrieval_report import write

    display = Display(line_seconds=15.0)

    def on_progress(done: int, total: int, facts: str, /) -> None:
        if display.is_due:
            display.show(f"{done}/{total}  {facts}".rstrip())

    try:
        results = ask_all(runs, scale, out, tell=display.message, on_progress=on_progress)
    finally:
        display.close()
    if not results:
        print("no run has a model yet; nothing to report")
        return
    written = write(results, outcome.rows, out)
    print(f"written to {', '.join(path.name for path in written)} in {out}")


def _print_plan(runs: list[Member]) -> None:
    from sambay.spec.footprint import parameter_count

    for member in runs:
        assert member.config is not None, "every contender can be built"
        model = member.config.model
        print(
            f"{member.name:<24} {model.layer_pattern:<28} window {model.window or '-':<4} "
            f"{parameter_count(model):>9,} parameters  "
            f"{member.config.num_steps * member.config.tokens_per_step:>12,} tokens  "
            f"{member.flops:.2e} FLOPs"
        )


def _whole(option: str, text: str, minimum: int = 1) -> int:
    from sambay.cli.overrides import parse_value

    value: int = parse_value(option, text.strip(), int)
    if value < minimum:
        raise ConfigError(f"{option} = {value}; it must be a whole number >= {minimum}")
    return value
