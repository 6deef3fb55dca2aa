"""The demo of `make demo`: data, two models, text, speed and pictures, all measured as it runs.

Finished parts of an earlier run in the same folder (data, trained models) are used again.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sambay.cli.main import main as sambay
from sambay.data.manifest import TRAIN, VALIDATION
from sambay.data.shards import TokenDataset
from sambay.data.tokenizer import Tokenizer
from sambay.demo.compressors import bits_per_byte
from sambay.demo.plan import has_other_length, make_plan, read_plan
from sambay.demo.report import (
    DemoResult,
    ModelResult,
    as_table,
    quality_rows,
    speed_rows,
    write_report,
)
from sambay.errors import SambayError
from sambay.generate import Engine, SamplingParams, TextGenerator
from sambay.model import LanguageModel
from sambay.recipes.demo import demo_sambay, demo_transformer
from sambay.spec.footprint import parameter_count
from sambay.speed import GenerationSpeed, compare_generation
from sambay.train.export import load_checkpoint_model
from sambay.train.metrics import read_metrics

RECIPES = {"SambaY": demo_sambay, "Transformer++": demo_transformer}
# Tests, other people's packages, and generated tables that are numbers rather than programs.
NOT_OUR_TEXT = (
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"),
)
PROMPT = '''def read_lines(path, encoding="utf-8"):
    """Return the lines of a text file.'''


def main() -> int:
    """The exit code of the demo: 0, or 2 after an error told in one line."""
    arguments = _parse()
    try:
        _run(arguments)
    except SambayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; run the demo again to go on from here", file=sys.stderr)
        return 130
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sambay.demo", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), help="folder for everything (demo)"
    )
    parser.add_argument(
        "--minutes", type=float, default=4.0, help="training time of each model, about (4)"
    )
    parser.add_argument(
        "--longest", type=int, default=16_384, help="longest context to measure (16384)"
    )
    parser.add_argument("--fresh", action="store_true", help="remove earlier results first")
    arguments = parser.parse_args()
    if arguments.minutes <= 0:
        parser.error("--minutes must be above 0")
    if arguments.longest < 512:
        parser.error("--longest must be at least 512")
    return arguments


def _run(arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    out: Path = arguments.out
    fresh: bool = arguments.fresh
    with _step(1, "Data: the sources of Python's standard library"):
        _prepare(out / "data", fresh)
        validation = TokenDataset.open(out / "data", VALIDATION)
        training = TokenDataset.open(out / "data", TRAIN)

    with _step(2, "Training two models of equal size on the same batches"):
        recipes = {title: recipe() for title, recipe in RECIPES.items()}
        plan = None if fresh else read_plan(out, arguments.minutes)
        if plan is None:
            print("measuring how many tokens fit into the minutes ...", flush=True)
            plan = make_plan(out, arguments.minutes, recipes, training, validation)
        print(f"{plan.total_tokens:,} tokens for each of them", flush=True)
        for title, recipe in RECIPES.items():
            run_dir = out / _folder_name(title)
            command = ["train", recipe.__name__, *plan.overrides(out / "data")]
            command += ["--run-dir", str(run_dir)]
            # Runs planned for other minutes cannot be continued; these are ours to replace.
            replace = fresh or has_other_length(run_dir, plan)
            _sambay([*command, "--fresh"] if replace else command)
        models = {title: load_checkpoint_model(out / _folder_name(title))[0] for title in RECIPES}

    with _step(3, "Held-out text: both models beside gzip and xz"):
        histories = {title: read_metrics(out / _folder_name(title)) for title in RECIPES}
        scores = {
            title: history[-1]["validation_bits_per_byte"] for title, history in histories.items()
        }
        compressors = bits_per_byte(
            validation.text(0, validation.num_tokens), training.text(0, training.num_tokens)
        )
        for name, bits in {**scores, **compressors}.items():
            print(f"{name:<14} {bits:.3f} bits per byte", flush=True)

    with _step(4, "The SambaY continues a prompt"):
        continuation = _continue(models["SambaY"], out / "data")

    with _step(5, "Speed against context length"):
        speeds = _measure(models, arguments.longest)

    result = DemoResult(
        models=[
            ModelResult(
                title,
                model.config,
                parameter_count(model.config),
                histories[title],
                scores[title],
                speeds[title],
            )
            for title, model in models.items()
        ],
        compressors=compressors,
        validation_bytes=validation.text_bytes,
        validation_tokens=validation.num_tokens,
        total_tokens=plan.total_tokens,
        environment=_environment(),
        command=shlex.join(["python", "-m", "sambay.demo", *sys.argv[1:]]),
        date=datetime.datetime.now().astimezone().date().isoformat(),
        commit=_commit(),
        prompt=PROMPT,
        continuation=continuation,
        seconds=time.perf_counter() - started,
    )
    paths = write_report(result, out)
    _say_goodbye(result, paths, out)


def _prepare(data: Path, fresh: bool) -> None:
    library = sysconfig.get_path("stdlib")
    command = ["prepare", library, "--out", str(data), "--vocab-size", "4096"]
    command += ["--include", "*.py", "--validation-fraction", "0.02"]
    for name in NOT_OUR_TEXT:
        command += ["--exclude", name]
    _sambay([*command, "--force"] if fresh else command)


def _sambay(words: list[str]) -> None:
    """Run a command of the command line tool in this process, showing it first."""
    print(f"$ sambay {shlex.join(words)}", flush=True)
    code = sambay(words)
    if code >= 128:  # a signal, which the command has answered by saving what it had
        raise KeyboardInterrupt
    if code != 0:
        raise SambayError(f"`sambay {words[0]}` ended with code {code}; see its message above")


def _continue(model: LanguageModel, data: Path) -> str:
    generator = TextGenerator(Engine(model), Tokenizer.load(data))
    print(PROMPT, end="", flush=True)
    pieces = []
    for piece in generator.stream(
        PROMPT, max_new_tokens=160, sampling=SamplingParams(temperature=0.7, top_p=0.95, seed=0)
    ):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return "".join(pieces)


def _measure(models: dict[str, LanguageModel], longest: int) -> dict[str, list[GenerationSpeed]]:
    contexts = [length for length in (2**power for power in range(9, 30)) if length <= longest]
    speeds: dict[str, list[GenerationSpeed]] = {title: [] for title in models}
    for title, point in compare_generation(models, contexts):
        speeds[title].append(point)
        print(
            f"{point.context:>7,} tokens  {title:<14} "
            f"prefill {point.prefill_tokens_per_second:>8,.0f} tokens/s   "
            f"decode {point.decode_tokens_per_second:>6,.0f} tokens/s   "
            f"cache {point.cache_bytes / 2**20:>6.1f} MiB",
            flush=True,
        )
    return speeds


def _say_goodbye(result: DemoResult, paths: list[Path], out: Path) -> None:
    print(f"\n{_bold('Results')}  {result.environment}\n")
    print(as_table(quality_rows(result)), end="\n\n")
    print(as_table(speed_rows(result)), end="\n\n")
    for path in paths:
        print(f"  {path}")
    prompt = shlex.quote("import os")
    print(f"\n  go on with: sambay generate --model {out / 'sambay'} --prompt {prompt}")
    print(f"  {result.seconds / 60:.1f} minutes")


@contextmanager
def _step(number: int, title: str) -> Iterator[None]:
    started = time.perf_counter()
    print(f"\n{_bold(f'{number}/5  {title}')}", flush=True)
    yield
    print(_quiet(f"     {time.perf_counter() - started:.0f} s"), flush=True)


def _bold(text: str) -> str:
    return f"\x1b[1m{text}\x1b[0m" if sys.stdout.isatty() else text


def _quiet(text: str) -> str:
    return f"\x1b[2m{text}\x1b[0m" if sys.stdout.isatty() else text


def _folder_name(title: str) -> str:
    return {"SambaY": "sambay", "Transformer++": "transformer"}[title]


def _environment() -> str:
    from sambay.cli.doctor import cpu_name

    return (
        f"{cpu_name()}, {torch.get_num_threads()} of {os.cpu_count()} processors, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def _commit() -> str:
    """The commit of the checkout, or "unknown" (no git, no checkout)."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
