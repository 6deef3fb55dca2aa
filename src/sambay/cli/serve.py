"""Serve a model folder with vLLM, behind an address that speaks the protocol of OpenAI.

Prints the address once the server answers, and stays until it is interrupted. Options behind a
plain -- are passed to vLLM as they are.

examples:
  sambay serve Phi-4-mini-flash-reasoning
  sambay serve runs/mine --port 9000 --max-length 8192 -- --max-num-seqs 32
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sambay.errors import ConfigError

RUN_MODEL = "model"  # where a run directory keeps its latest model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `sambay serve`."""
    parser.add_argument("folder", type=Path, help="a model folder of either layout, or a run's")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port (8000)")
    parser.add_argument("--name", help="what clients call the model (the folder's name)")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"),
        help="of weights and activations; states are float32 (auto: that of the file)",
    )  # fmt: skip
    parser.add_argument(
        "--max-length", type=int, metavar="N",
        help="prompt and answer together, in tokens (the longest that fits in memory)",
    )  # fmt: skip
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, metavar="N", help="divide the model (1)"
    )
    parser.add_argument(
        "--no-prefix-caching", action="store_true", help="do not keep the states of prompts"
    )
    parser.add_argument(
        "--fast-prefill", action=argparse.BooleanOptionalAction, default=None,
        help="the cross-decoder only where text is wanted (where there is one)",
    )  # fmt: skip
    parser.add_argument(
        "--eager", action="store_true", help="no torch.compile: starts sooner, answers slower"
    )
    parser.add_argument(
        "--cache-gib", type=int, metavar="N", help="memory for keys and states on a CPU (vLLM's)"
    )
    parser.add_argument(
        "--timeout", type=float, default=1800.0, metavar="S", help="seconds to come up (1800)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the command of vLLM and start nothing"
    )
    parser.add_argument("further", nargs="*", metavar="-- OPTION", help="options of vLLM")


def run(args: argparse.Namespace) -> int:
    """Start, print the address, and wait; the exit code of the server, 0 after ^C.

    Raises:
        ConfigError: a number that cannot be, a port that is taken.
        SambayError: as `sambay.serve.command.running_server`.
    """
    for name, value in (
        ("--max-length", args.max_length),
        ("--tensor-parallel", args.tensor_parallel),
        ("--cache-gib", args.cache_gib),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value} is too small; it must be at least 1")
    if not 1 <= args.port <= 65535:
        raise ConfigError(f"--port {args.port} is no port; choose one from 1 to 65535")
    if not args.timeout > 0:
        raise ConfigError(f"--timeout {args.timeout:g} is too small; it must be above 0")
    from sambay.hf.loading import is_model_folder
    from sambay.serve.command import ServerOptions, quoted, running_server, server_command

    folder: Path = args.folder
    name = args.name or folder.resolve().name
    if not is_model_folder(folder) and is_model_folder(folder / RUN_MODEL):
        folder = folder / RUN_MODEL
    options = ServerOptions(
        host=args.host,
        port=args.port,
        name=name,
        dtype=args.dtype,
        max_length=args.max_length,
        processes=args.tensor_parallel,
        prefix_caching=not args.no_prefix_caching,
        fast_prefill=args.fast_prefill,
        compiled=not args.eager,
        cache_gib=args.cache_gib,
        further=tuple(args.further),
    )
    if args.dry_run:
        print(quoted(server_command(folder, options)))
        return 0
    with running_server(folder, options, timeout=args.timeout) as process:
        print(f"\n{name} answers at {options.url}/v1 (stop with ^C)", flush=True)
        try:
            return process.wait()
        except KeyboardInterrupt:
            return 0
