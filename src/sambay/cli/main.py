"""The `sambay` command: finds the subcommand, and turns errors into one line and an exit code.

Each subcommand is a module of this package with `add_arguments(parser)` and `run(args)`, which may
return an exit code; or a package with `SUBCOMMANDS`, a table like `COMMANDS` below, whose modules
are its commands; or both. It is imported only when it is called, and none needs torch for its
`--help`.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Mapping, Sequence

from sambay import __version__
from sambay.errors import SambayError, nearest

COMMANDS = {
    "prepare": "turn files of text into token shards with a tokenizer",
    "train": "train a model by a recipe; continues where an earlier run stopped",
    "generate": "let a trained model continue a prompt",
    "chat": "talk with a model in the terminal",
    "serve": "serve a model with vLLM, behind an address that speaks the protocol of OpenAI",
    "evaluate": "ask a model the questions of a suite, with results that can be resumed",
    "convert": "turn a model from one file format into another",
    "init": "write a model folder with random weights, of any size, to try things with",
    "doctor": "show versions, devices and which implementation of each operation is available",
    "bench": "measure prefill, decode and training speed on this machine",
    "study": "whole studies, from data to a page with tables and pictures",
    "scaling": "train ladders of sizes, fit scaling laws, check and transfer hyperparameters",
}
_EXIT_ERROR, _EXIT_INTERRUPTED, _EXIT_BROKEN_PIPE = 2, 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 2 for a user's mistake (explained in one line), 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Threads that wait by spinning cost up to ten times the speed as soon as another program wants
    # a core, and gain nothing measurable when none does. Read by OpenMP when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        code = _dispatch(words)
        sys.stdout.flush()
    except SambayError as error:
        # Of the processes of a run the first speaks, unless only others know.
        if os.environ.get("RANK", "0") == "0" or type(error).__name__ == "LostConnection":
            print(f"error: {error}", file=sys.stderr)
        return _EXIT_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone (`sambay ... | head`); keep Python from flushing again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_BROKEN_PIPE
    return code


def _dispatch(
    words: list[str],
    package: str = "sambay.cli",
    spoken: str = "sambay",
    commands: Mapping[str, str] = COMMANDS,
) -> int:
    """The exit code of the command that `words` name among the `commands` of a package.

    `spoken` is what the user has typed before them.
    """
    if not words or words[0].startswith("-"):
        parser = _parser_of(package, spoken, commands)
        parser.parse_args(words)  # answers --help and --version, refuses other options
        parser.print_help()
        return 0
    name, *rest = words
    if name not in commands:
        kind = spoken.removeprefix("sambay").strip()
        what = f"{kind} command" if kind else "command"
        raise SambayError(f"unknown {what} '{name}'{nearest(name, commands)}")
    module = f"{package}.{name.replace('-', '_')}"
    command = importlib.import_module(module)
    inner = getattr(command, "SUBCOMMANDS", None)
    # A command may have subcommands beside its own arguments.
    if inner is not None and (not hasattr(command, "run") or (rest and rest[0] in inner)):
        return _dispatch(rest, module, f"{spoken} {name}", inner)
    parser = argparse.ArgumentParser(
        prog=f"{spoken} {name}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    # Intermixed: overrides may stand before and after options.
    return command.run(parser.parse_intermixed_args(rest)) or 0


def _parser_of(package: str, spoken: str, commands: Mapping[str, str]) -> argparse.ArgumentParser:
    width = max(len(name) for name in commands)
    listing = "\n".join(f"  {name:<{width}}  {text}" for name, text in commands.items())
    is_top = package == "sambay.cli"
    parser = argparse.ArgumentParser(
        prog=spoken,
        usage=f"{spoken} COMMAND [options]",
        description=(
            "SambaY and its family: prepare text, train, generate and measure."
            if is_top
            else importlib.import_module(package).__doc__
        ),
        epilog=f"commands:\n{listing}\n\n`{spoken} COMMAND --help` explains one of them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if is_top:
        parser.add_argument("--version", action="version", version=f"sambay {__version__}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
