"""Ask a model the questions of a suite, and say how much it gets right.

MODEL is a model folder (native or official), a training run directory or a checkpoint; with
--backend transformers the folder of any local model, with --backend server the name that the
server knows. SUITE is a name below or FILE.py:CLASS; its options are written name=value, lists
with commas.

Every answer is kept as soon as it is known: after Ctrl-C, or when the machine went down, the same
command goes on where it was. DIR/result.json has the metrics, settings and fingerprints,
DIR/samples.jsonl every question's answer.

examples:
  sambay evaluate runs/mine phonebook pairs=100,400 --out results/mine-phonebook
  sambay evaluate Phi-4-mini-flash-reasoning downstream limit=100 --dry-run
  sambay evaluate my-model reasoning --backend server --url http://127.0.0.1:8000
  sambay evaluate --table results/a results/b --out comparison.md

exit codes: 0 done, 2 a mistake (nothing was asked), 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sambay.cli.backends import BACKENDS, check_options, open_backend, open_rehearsal
from sambay.cli.loading import add_loading_options
from sambay.errors import ConfigError, MissingPackage, nearest
from sambay.evals.catalogue import SUITES, Evaluation, is_required, open_suite, options_of

if TYPE_CHECKING:
    from sambay.evals.calls import Backend
    from sambay.evals.result import Result

EXIT_INTERRUPTED = 130
_LINE_SECONDS = 15.0  # between lines where there is no terminal
_BAR_WIDTH = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `sambay evaluate`."""
    width = max(map(len, SUITES))
    listing = "\n".join(f"  {name:<{width}}  {entry.help}" for name, entry in SUITES.items())
    parser.epilog = f"suites:\n{listing}"
    parser.add_argument(
        "words", nargs="*", metavar="MODEL SUITE name=value", help="what is asked of which model"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="where it is kept (results/MODEL-SUITE); with --table the file to write",
    )  # fmt: skip
    parser.add_argument(
        "--table", nargs="+", type=Path, metavar="RESULT",
        help="no evaluation: a table of finished ones, given as result.json or their folders",
    )  # fmt: skip
    parser.add_argument(
        "--backend", choices=BACKENDS, default="engine", help="who computes the answers (engine)"
    )
    parser.add_argument(
        "--url", metavar="URL", help="of an OpenAI-compatible server: http://127.0.0.1:8000"
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N",
        help="most rows at once (what memory allows), or requests on their way to the server (16)",
    )  # fmt: skip
    parser.add_argument(
        "--max-context", type=int, metavar="N",
        help="most tokens of prompt and answer (what the model's files say, else no limit)",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be asked, load no weights, and stop"
    )
    add_loading_options(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate, or write a table; 0, or 130 after Ctrl-C.

    Raises:
        SambayError: anything wrong with the arguments, the suite's data or the model.
    """
    if args.table is not None:
        return _write_table(args)
    if len(args.words) < 2:
        raise ConfigError("give a model and a suite: sambay evaluate MODEL SUITE [name=value ...]")
    model, suite_name, *words = args.words
    check_options(args)
    name, suite = build_suite(suite_name, words)
    if args.dry_run:
        return _rehearse(args, model, suite)
    from sambay.evals.backends.identity import model_name

    out = args.out or Path("results") / f"{model_name(Path(model))}-{name}"
    return _evaluate(suite, open_backend(args, model), out)


def build_suite(text: str, words: list[str]) -> tuple[str, Evaluation]:
    """The short name and the suite with the options in `words`, each `name=value`.

    Raises:
        ConfigError: an unknown suite or option (suggests the nearest), or a value that does not
            fit.
    """
    name, suite = open_suite(text)
    options = options_of(suite)
    given: dict[str, Any] = {}
    for word in words:
        option, equals, value = word.partition("=")
        option = option.strip()
        if not equals:
            raise ConfigError(f"'{word}' is no option of the suite; write name=value")
        if option not in options:
            raise ConfigError(f"suite '{name}' has no option '{option}'{nearest(option, options)}")
        if option in given:
            raise ConfigError(f"{option} is given twice; leave one of them out")
        given[option] = _parsed(option, value.strip(), options[option])
    for field in dataclasses.fields(suite):
        if is_required(field) and field.name not in given:
            raise ConfigError(f"suite '{name}' needs {field.name}=VALUE; write it behind the suite")
    return name, cast("Evaluation", suite(**given))


def _parsed(name: str, text: str, hint: Any) -> Any:
    """The value of an option: what overrides can be, and paths and lists of any such values."""
    from types import NoneType
    from typing import get_args, get_origin

    from sambay.cli.overrides import parse_value

    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    is_optional = NoneType in get_args(hint)
    if is_optional and text.lower() == "none":
        return None
    kind = kinds[0] if is_optional and len(kinds) == 1 else hint
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        parts = [part.strip() for part in text.split(",")] if text else []
        return tuple(_parsed(name, part, item) for part in parts)
    return Path(text).expanduser() if kind is Path else parse_value(name, text, hint)


def _rehearse(args: argparse.Namespace, model: str, suite: Evaluation) -> int:
    """Let the suite ask a model that answers nothing, and print how much that was."""
    rehearsal = open_rehearsal(args, model)
    with tempfile.TemporaryDirectory() as folder:
        result = suite.evaluate(rehearsal, Path(folder))
    for name, value in result.settings.items():
        print(f"{name} = {value}")
    counts = [f"{rehearsal.num_calls:,} to answer"] if rehearsal.num_calls else []
    counts += [f"{rehearsal.num_passages:,} to score"] if rehearsal.num_passages else []
    print(f"questions: {', '.join(counts) or 'none'}")
    if rehearsal.measures:
        limit = rehearsal.max_context
        context = "no limit" if limit is None else f"{limit:,}"
        print(
            f"longest prompt: {rehearsal.longest_prompt:,} tokens, {rehearsal.longest_whole:,} "
            f"with its answer (context: {context})"
        )
    else:
        print("longest prompt: unknown without --tokenizer")
    return 0


def _evaluate(suite: Evaluation, backend: Backend, out: Path) -> int:
    from sambay.evals.result import RESULT, shown
    from sambay.studies.progress import Display

    display = Display(line_seconds=_LINE_SECONDS)

    def on_progress(done: int, total: int, facts: str, /) -> None:
        if display.is_due:
            filled = _BAR_WIDTH * done // max(total, 1)
            bar = "━" * filled + " " * (_BAR_WIDTH - filled)
            display.show(f"{done}/{total} |{bar}| {facts}".rstrip())

    try:
        result = suite.evaluate(backend, out, on_progress=on_progress)
    except KeyboardInterrupt:
        display.close()
        print(
            f"interrupted; what is answered is kept in {out}, run the same command again to go on",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    finally:
        display.close()
    for line in shown(result.metrics):
        print(line)
    files = [out / RESULT, *_draw(suite, result, out)]
    print(f"written to {', '.join(map(str, files))}")
    return 0


def _draw(suite: Evaluation, result: Result, out: Path) -> list[Path]:
    """The pictures of a suite that has some, as PNG and SVG."""
    pictures = getattr(suite, "pictures", None)
    if pictures is None:
        return []
    from sambay.plots.canvas import save

    try:
        figures = pictures(result)
    except MissingPackage as error:  # the numbers are there all the same
        print(f"no pictures: {error}", file=sys.stderr)
        return []
    return [
        save(figure, out / f"{name}{suffix}")
        for name, figure in figures.items()
        for suffix in (".png", ".svg")
    ]


def _write_table(args: argparse.Namespace) -> int:
    if args.words:
        raise ConfigError(
            f"--table takes finished results, '{args.words[0]}' is not one of its files; leave "
            "model and suite out"
        )
    from sambay.evals.result import read_result
    from sambay.evals.table import table
    from sambay.files import atomic_write

    results = [read_result(path) for path in args.table]
    text = table(results)
    if args.out is None:
        print(text, end="" if text.endswith("\n") else "\n")
        return 0
    with atomic_write(args.out) as file:
        file.write(text.rstrip("\n").encode() + b"\n")
    written = [args.out, *_draw_together(results, args.out)]
    print(f"written to {', '.join(map(str, written))}")
    return 0


def _draw_together(results: list[Result], beside: Path) -> list[Path]:
    """Pictures of several models' phone books, by length and by window, where these differ."""
    from sambay.evals.phonebook.comparison import draw_lengths, draw_windows
    from sambay.plots.canvas import save

    books = [result for result in results if result.suite == "phonebook"]
    if len(books) < 2 or len({result.items_sha256 for result in books}) > 1:
        return []
    figures = {}
    try:
        if len(books[0].settings["pairs"]) > 1:
            figures["lengths"] = draw_lengths(books)
        if len({result.model.get("window") for result in books}) > 1:
            figures["windows"] = draw_windows(books)
    except MissingPackage as error:  # the table is there all the same
        print(f"no pictures: {error}", file=sys.stderr)
    return [
        save(figure, beside.with_name(f"{beside.stem}_{name}{suffix}"))
        for name, figure in figures.items()
        for suffix in (".png", ".svg")
    ]
