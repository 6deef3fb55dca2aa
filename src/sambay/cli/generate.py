"""Continue a prompt with a trained model.

The continuation goes to standard output as it is produced, a line of speeds to standard error.
Without --prompt and --prompt-file the prompt is read from standard input; of a file or of standard
input one line break at the end is dropped. With --chat the prompt is one user's turn, written as
the model's chat template says; a prompt is text in either case, never a control token.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sambay.cli.loading import LoadedModel, add_model_options, load, require_positive
from sambay.errors import ConfigError

if TYPE_CHECKING:
    from sambay.generate.engine import Timings
    from sambay.generate.sampling import SamplingParams
    from sambay.generate.text import TextCompletion, TextGenerator

EXIT_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `sambay generate`."""
    parser.add_argument(
        "--model", required=True, metavar="PATH",
        help="a model folder (native or official), a training run directory, or a checkpoint",
    )  # fmt: skip
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    source.add_argument("--prompt-file", metavar="FILE", help="a UTF-8 file; - is stdin")
    parser.add_argument("--chat", action="store_true", help="let the model answer the prompt")
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="at most N tokens (256)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="X", help="0 is greedy (0.8)"
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="only the K likeliest; 0 is all (0)",
    )
    parser.add_argument(
        "--top-p", type=float, default=0.95, metavar="P",
        help="only the likeliest tokens that hold this probability; 1 is all (0.95)",
    )  # fmt: skip
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X",
        help="above 1 makes tokens that occurred less likely (1)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same text (0)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT",
        help="end before this text; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--num-samples", type=int, default=1, metavar="N", help="continuations to write (1)"
    )
    parser.add_argument(
        "--no-stream", action="store_true", help="print the text when it is complete"
    )
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Load, generate and print; 0, or 130 after Ctrl-C.

    Raises:
        SambayError: anything wrong with the arguments, the model folder or the prompt.
    """
    sampling = _sampling(args)
    prompt = _read_prompt(args)
    loaded = load(args, Path(args.model))
    generator = loaded.generator
    writer = _Writer(args, sampling, generator, *_prompt_and_stops(args, loaded, prompt))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character
    interrupted = False
    try:
        if args.num_samples == 1 and not args.no_stream:
            writer.stream()
        else:
            writer.print_samples()
    except KeyboardInterrupt:
        interrupted = True
        print(flush=True)
    print(_summary(generator.engine.timings), file=sys.stderr)
    return EXIT_INTERRUPTED if interrupted else 0


def _sampling(args: argparse.Namespace) -> SamplingParams:
    """The checked settings; torch comes along, so not before `run`."""
    require_positive(args, "max_new_tokens", "num_samples", "threads")
    for name in ("system", "template"):
        if getattr(args, name) is not None and not args.chat:
            raise ConfigError(f"--{name} is for chats; add --chat or leave it out")
    if args.num_samples > 1 and args.temperature == 0:
        raise ConfigError(
            f"--num-samples {args.num_samples} with --temperature 0 would write one text "
            f"{args.num_samples} times; give a temperature above 0"
        )
    if "" in args.stop:
        raise ConfigError("--stop is empty; give at least one character or leave it out")
    if not Path(args.model).exists():
        raise ConfigError(
            f"--model {args.model} does not exist; give a model folder or a training run directory"
        )
    from sambay.generate.sampling import SamplingParams

    return SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )


def _read_prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        text = args.prompt
    else:
        text = _read_text(args.prompt_file or "-")
        text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise ConfigError(
            "the prompt is empty; give some text with --prompt, --prompt-file or standard input"
        )
    return text


def _read_text(file: str) -> str:
    name = "standard input" if file == "-" else f"--prompt-file {file}"
    try:
        if file != "-":
            return Path(file).read_bytes().decode("utf-8")
        if sys.stdin.isatty():
            print("Type the prompt; end it with Ctrl-D on a line of its own.", file=sys.stderr)
        return sys.stdin.buffer.read().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror}; give a readable text file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{name} is not UTF-8 text (byte {error.start}); convert it to UTF-8"
        ) from error


def _prompt_and_stops(
    args: argparse.Namespace, loaded: LoadedModel, prompt: str
) -> tuple[str | list[int], frozenset[int]]:
    """What the model gets to see, and the tokens that end its text."""
    if not args.chat:
        return prompt, loaded.end_ids
    from sambay.hf.chat import Message

    chat_format = loaded.chat_format(args.template)
    turns = [] if args.system is None else [Message("system", args.system)]
    ids = chat_format.prompt([*turns, Message("user", prompt)])
    return ids, loaded.end_ids | chat_format.turn_ends


class _Writer:
    def __init__(
        self,
        args: argparse.Namespace,
        sampling: SamplingParams,
        generator: TextGenerator,
        prompt: str | list[int],
        stop_token_ids: frozenset[int],
    ) -> None:
        self.num_samples: int = args.num_samples
        self.generator = generator
        self.prompt = prompt
        self.settings: dict[str, Any] = {
            "max_new_tokens": args.max_new_tokens,
            "sampling": sampling,
            "stop": args.stop,
            "stop_token_ids": stop_token_ids,
        }

    def stream(self) -> None:
        for piece in self.generator.stream(self.prompt, **self.settings):
            print(piece, end="", flush=True)
        print(flush=True)

    def print_samples(self) -> None:
        """Print samples in order, each as soon as it and all before it are complete."""
        waiting: dict[int, str] = {}
        num_printed = 0

        def show(completion: TextCompletion) -> None:
            nonlocal num_printed
            waiting[completion.sample] = completion.text
            while num_printed in waiting:
                if self.num_samples > 1:
                    print(f"--- sample {num_printed + 1} of {self.num_samples} ---")
                print(waiting.pop(num_printed), flush=True)
                num_printed += 1

        self.generator.generate(
            [self.prompt], num_samples=self.num_samples, on_finished=show, **self.settings
        )


def _summary(timings: Timings) -> str:
    def speed(what: str, tokens: int, seconds: float) -> str:
        rate = f" ({tokens / seconds:.4g} tokens/s)" if seconds > 0 else ""
        return f"{what} {tokens} tokens in {seconds:.2f} s{rate}"

    return ", ".join(
        (
            speed("prefill", timings.prefill_tokens, timings.prefill_seconds),
            speed("decode", timings.decode_tokens, timings.decode_seconds),
        )
    )
