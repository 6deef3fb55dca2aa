"""Talk with a model.

Answers stream to standard output, a line of speeds after each to standard error. In a terminal
/reset starts a new conversation, /exit or Ctrl-D leaves, /help lists the commands, and Ctrl-C stops
an answer. From a pipe every line is one turn, and only the answers are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sambay.cli.loading import LoadedModel, add_model_options, load, require_positive
from sambay.errors import ConfigError, SambayError, nearest

if TYPE_CHECKING:
    from sambay.generate.engine import Timings
    from sambay.generate.requests import Request
    from sambay.generate.sampling import SamplingParams

COMMANDS = {
    "/reset": "forget the conversation and start a new one",
    "/exit": "leave; so does Ctrl-D",
    "/help": "show this",
}
_THOUGHT = ("<think>", "</think>")
_DIM, _PLAIN = "\033[2m", "\033[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `sambay chat`."""
    parser.add_argument(
        "path", metavar="PATH", type=Path,
        help="a model folder (native or official), a training run directory, or a checkpoint",
    )  # fmt: skip
    parser.add_argument(
        "--max-new-tokens", type=int, default=32768, metavar="N",
        help="at most N tokens per answer (32768)",
    )  # fmt: skip
    # The settings of the published evaluation of Phi-4-mini-flash-reasoning.
    parser.add_argument(
        "--temperature", type=float, default=0.6, metavar="X", help="0 is greedy (0.6)"
    )
    parser.add_argument(
        "--top-p", type=float, default=0.95, metavar="P",
        help="only the likeliest tokens that hold this probability; 1 is all (0.95)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same text (0)")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Load and talk until the input ends; 0, or 128 + signal number if one ended it.

    Raises:
        SambayError: anything wrong with the arguments or the model; from a pipe, with a turn.
    """
    require_positive(args, "max_new_tokens", "threads")
    from sambay.generate.sampling import SamplingParams

    sampling = SamplingParams(temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    if not args.path.exists():
        raise ConfigError(
            f"{args.path} does not exist; give a model folder or a training run directory"
        )
    loaded = load(args, args.path)
    chat = Chat(loaded, args, sampling)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character
    typed = sys.stdin.isatty()
    if typed:
        print("/help lists the commands, Ctrl-D leaves", file=sys.stderr)
    for line in _typed_lines() if typed else _piped_lines():
        text = line.strip()
        if not text:
            continue
        if text in COMMANDS or re.fullmatch(r"/[a-z]+", text):
            if text == "/exit":
                break
            chat.obey(text)
            continue
        try:
            ended_by = chat.answer(text)
        except SambayError as error:
            if not typed:
                raise
            print(f"error: {error}", file=sys.stderr)
            continue
        if ended_by is not None and not (typed and ended_by == signal.SIGINT):
            return 128 + ended_by
    return 0


class Chat:
    """A conversation whose cache is kept from turn to turn."""

    def __init__(
        self, loaded: LoadedModel, args: argparse.Namespace, sampling: SamplingParams
    ) -> None:
        from sambay.generate.session import Session
        from sambay.hf.chat import Message
        from sambay.hf.tokenizer import context_limit

        self.engine = loaded.generator.engine
        self.tokenizer = loaded.generator.tokenizer
        self.format = loaded.chat_format(args.template)
        self.session = Session(self.engine)
        self.sampling = sampling
        self.max_new_tokens: int = args.max_new_tokens
        self.end_ids = loaded.end_ids | self.format.turn_ends
        self.context = context_limit(loaded.folder, loaded.tokenizer_folder)
        self.start = [] if args.system is None else [Message("system", args.system)]
        self.messages = list(self.start)

    def obey(self, command: str) -> None:
        """Carry out /reset or /help; explain what else there is."""
        if command == "/reset":
            self.messages = list(self.start)
            self.session.reset()
        elif command == "/help":
            for name, what in COMMANDS.items():
                print(f"{name}  {what}", file=sys.stderr)
        else:
            print(f"unknown command '{command}'{nearest(command, COMMANDS)}", file=sys.stderr)

    def answer(self, text: str) -> int | None:
        """Print the answer to one more turn; the number of the signal that cut it short, if any.

        What was printed belongs to the conversation, also if it was cut short.

        Raises:
            SambayError: the turn cannot be answered; the conversation is as before.
        """
        from sambay.data.stream_decoder import StreamDecoder
        from sambay.hf.chat import Message
        from sambay.train.interrupt import StopRequest

        turns = [*self.messages, Message("user", text)]
        ids = self.format.prompt(turns)
        before = dataclasses.replace(self.engine.timings)
        events = self.session.stream(self._request(ids, len(turns)))
        thinks = self.tokenizer.decode(ids[-8:]).rstrip().endswith(_THOUGHT[0])
        screen = Screen(_has_styles(), thinks)
        decoder = StreamDecoder(self.tokenizer)
        produced: list[int] = []
        shown: list[str] = []
        reason = "stopped"
        try:
            with StopRequest() as stop, contextlib.suppress(KeyboardInterrupt):
                for event in events:
                    if event.token not in self.end_ids:
                        produced.append(event.token)
                        shown.append(decoder.push(event.token))
                        screen.write(shown[-1])
                    if event.finish_reason is not None:
                        reason = event.finish_reason
                    elif stop.signal_number is not None:
                        break
        finally:
            shown.append(decoder.finish())
            screen.write(shown[-1])
            screen.finish()
        self.messages = [*turns, Message("assistant", "".join(shown), tuple(produced))]
        print(self._summary(before, len(produced), reason), file=sys.stderr, flush=True)
        return stop.signal_number or (signal.SIGINT if reason == "stopped" else None)

    def _request(self, ids: list[int], num_turns: int) -> Request:
        from sambay.generate import Request, sample_seed

        room = self.max_new_tokens
        if self.context is not None:
            room = min(room, self.context - len(ids))
            if room < 1:
                raise ConfigError(
                    f"the conversation has {len(ids)} tokens, the model's context is "
                    f"{self.context}; /reset starts a new one"
                )
        seed = sample_seed(self.sampling.seed, num_turns // 2)
        sampling = dataclasses.replace(self.sampling, seed=seed)
        return Request(ids, room, sampling, self.end_ids)

    def _summary(self, before: Timings, produced: int, reason: str) -> str:
        now = self.engine.timings
        tokens = now.decode_tokens - before.decode_tokens
        seconds = now.decode_seconds - before.decode_seconds
        read = now.prefill_tokens - before.prefill_tokens
        reading = now.prefill_seconds - before.prefill_seconds
        speed = f" ({tokens / seconds:.4g} tokens/s)" if tokens and seconds > 0 else ""
        ended = {"stop": "", "length": ", cut at the limit"}.get(reason, ", stopped")
        return (
            f"[{produced} tokens{speed}{ended}; read {read} tokens in {reading:.2f} s; "
            f"{self.session.length} tokens in the cache]"
        )


class Screen:
    """Writes an answer as it comes, thoughts dimmed where the terminal can."""

    def __init__(self, styled: bool, thinks: bool) -> None:
        self.styled = styled
        self._thinks = thinks
        self._held = ""
        if styled and thinks:
            self._print(_DIM)

    def write(self, text: str) -> None:
        """Show more text; holds back what may be the beginning of a mark."""
        if not self.styled:
            self._print(text)
            return
        self._held += text
        while True:
            mark = _THOUGHT[self._thinks]
            place = self._held.find(mark)
            if place < 0:
                break
            end = place + len(mark)
            shown = self._held[:end] + _PLAIN if self._thinks else (
                self._held[:place] + _DIM + self._held[place:end]
            )  # fmt: skip
            self._print(shown)
            self._held = self._held[end:]
            self._thinks = not self._thinks
        keep = max(n for n in range(len(mark)) if n == 0 or self._held.endswith(mark[:n]))
        self._print(self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]

    def finish(self) -> None:
        """End the answer with a line break, in the terminal's own style."""
        self._print(self._held + (_PLAIN if self.styled and self._thinks else "") + "\n")
        self._held = ""

    def _print(self, text: str) -> None:
        if text:
            print(text, end="", flush=True)


def _has_styles() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def _typed_lines() -> Iterator[str]:
    """What is typed, a turn each; a text pasted in one go is one turn where readline knows."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its editing and history)
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print("\nCtrl-D or /exit leaves", file=sys.stderr)
        except EOFError:
            print()
            return


def _piped_lines() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"standard input, line {number}, is not UTF-8 text (byte {error.start}); "
                "convert it to UTF-8"
            ) from error
