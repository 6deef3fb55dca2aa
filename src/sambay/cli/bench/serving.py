"""Measure servers that speak the protocol of OpenAI: throughput and latency by concurrency.

Requests of one length of random tokens are sent to each server in turn, level by level, so that a
machine that slows down slows all of them. With several servers each level has the ratio of their
throughputs, and the last table has it at equal latency.

examples:
  sambay bench serving http://127.0.0.1:8000 --prompt-tokens 512 --new-tokens 2048
  sambay bench serving sambay=http://127.0.0.1:8000 transformer=http://127.0.0.1:8001 \\
      --concurrency 1 2 4 8 16 --json serving.json --plot serving.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sambay.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `sambay bench serving`."""
    parser.add_argument(
        "servers", nargs="+", metavar="[NAME=]URL", help="the first is what others are compared to"
    )
    parser.add_argument(
        "--concurrency", nargs="+", type=int, default=[1, 2, 4, 8, 16], metavar="N",
        help="requests on their way at once (1 2 4 8 16)",
    )  # fmt: skip
    parser.add_argument(
        "--requests", type=int, metavar="N", help="per level (twice the concurrency, at least 4)"
    )
    parser.add_argument(
        "--prompt-tokens", type=int, default=512, metavar="N", help="per request (512)"
    )
    parser.add_argument(
        "--new-tokens", type=int, default=2048, metavar="N", help="per request (2048)"
    )
    parser.add_argument(
        "--vocabulary", type=int, default=256, metavar="N", help="prompt ids are below N (256)"
    )
    parser.add_argument(
        "--rounds", type=int, default=1, metavar="N",
        help="readings of each level; the fastest counts (1)",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="seconds per request (600)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the prompts (0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them as .png or .svg")


def run(args: argparse.Namespace) -> int:
    """Measure and print; 0.

    Raises:
        ConfigError: a number that is too small, two servers of one name, no address.
        LoadFailed: a server that does not answer.
        MissingPackage: --plot without matplotlib.
    """
    for name, values in (
        ("--concurrency", args.concurrency),
        ("--requests", [1 if args.requests is None else args.requests]),
        ("--prompt-tokens", [args.prompt_tokens]),
        ("--new-tokens", [args.new_tokens]),
        ("--vocabulary", [args.vocabulary]),
        ("--rounds", [args.rounds]),
        ("--timeout", [args.timeout]),
    ):
        if min(values) < 1:
            raise ConfigError(f"{name} {min(values)} is too small; it must be at least 1")
    from sambay.serve.load import Workload, find_model
    from sambay.serve.load_report import compare, draw, lines, measure

    named = _named(args.servers)
    if args.plot is not None:
        from sambay.plots.canvas import new_figure

        new_figure(1, 1)  # says now, not after the measurement, that matplotlib is missing
    servers = [find_model(name, url) for name, url in named.items()]
    workload = Workload(
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        vocabulary=args.vocabulary,
        timeout=args.timeout,
        seed=args.seed,
    )
    levels = measure(
        servers, workload, sorted(set(args.concurrency)), requests=args.requests,
        rounds=args.rounds, tell=lambda line: print(line, flush=True),
    )  # fmt: skip
    compared = compare(levels)
    print("\n" + "\n".join(lines(levels, compared)))
    if args.json is not None:
        from sambay.cli.doctor import build_report
        from sambay.files import write_json
        from sambay.serve.load_report import as_json

        write_json(
            args.json, {"environment": build_report(), **as_json(workload, levels, compared)}
        )
        print(f"\nwritten to {args.json}")
    if args.plot is not None:
        from sambay.plots.canvas import save

        save(draw(levels, workload), args.plot)
        print(f"drawn to {args.plot}")
    return 0


def _named(words: list[str]) -> dict[str, str]:
    """Addresses by name; without one, the host and port are the name."""
    named: dict[str, str] = {}
    for word in words:
        name, found, url = word.partition("=")
        if not found or "://" in name:
            name, url = word.partition("://")[2].rstrip("/"), word
        if name in named:
            raise ConfigError(f"two servers are called '{name}'; write OTHER_NAME={url}")
        named[name] = url
    return named
