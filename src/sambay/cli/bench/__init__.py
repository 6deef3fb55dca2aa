"""Measure training, prefill and decode speed of recipes' models on this machine.

Commands of their own are `sambay bench generation`, long generation under load, and
`sambay bench serving`, servers under load.

Models are freshly initialised, so no data is needed. Their readings alternate, so the ratios hold
even on a noisy machine; of several readings the fastest counts.

example:
  sambay bench demo_sambay demo_transformer --contexts 512 4096 16384 --json speed.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sambay.errors import ConfigError

if TYPE_CHECKING:
    from sambay.train.config import RunConfig

# As `sambay.cli.main.COMMANDS`; any other word is a recipe.
SUBCOMMANDS = {
    "generation": "throughput and latency of long generation under load",
    "serving": "throughput and latency of servers that speak the protocol of OpenAI",
}
DEFAULT_RECIPES = ["demo_sambay", "demo_transformer"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `sambay bench`."""
    parser.add_argument(
        "recipes", nargs="*", metavar="RECIPE", help=f"default: {' '.join(DEFAULT_RECIPES)}"
    )
    parser.add_argument(
        "--contexts", nargs="+", type=int, default=[512, 2048, 8192], metavar="N",
        help="context lengths in tokens (512 2048 8192)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="rows (1)")
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="readings, the fastest counts (3)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (all)")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu or cuda (cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")


def run(args: argparse.Namespace) -> int:
    """Measure and print; 0.

    Raises:
        ConfigError: an unknown recipe or device, or a number below 1.
    """
    for name, values in (
        ("--contexts", args.contexts),
        ("--batch-size", [args.batch_size]),
        ("--repeats", [args.repeats]),
        ("--threads", [1 if args.threads is None else args.threads]),
    ):
        if min(values) < 1:
            raise ConfigError(f"{name} {min(values)} is too small; it must be at least 1")
    report = _measure(args)
    if args.json is not None:
        from sambay.files import write_json

        write_json(args.json, report)
        print(f"\nwritten to {args.json}")
    return 0


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    import dataclasses

    import torch

    from sambay.cli.doctor import build_report
    from sambay.model import LanguageModel
    from sambay.recipes.catalogue import find_recipe
    from sambay.speed import compare_generation

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device; use cpu")
    if args.device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {args.device} is unknown; use cpu or cuda")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    recipes = dict(find_recipe(text) for text in args.recipes or DEFAULT_RECIPES)
    models = {name: LanguageModel(recipe.model).to(args.device) for name, recipe in recipes.items()}
    width = max(map(len, models))
    print("training step as in the recipe")
    training = _training_rates(recipes, args)
    for name, rate in training.items():
        print(f"  {name:<{width}}  {rate:>9,.0f} tokens/s", flush=True)
    print(f"generation, batch {args.batch_size}, float32")
    generation: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    for name, point in compare_generation(
        models, sorted(args.contexts), batch_size=args.batch_size, repeats=args.repeats
    ):
        generation[name].append(dataclasses.asdict(point))
        print(
            f"  {name:<{width}}  {point.context:>7,} tokens   "
            f"prefill {point.prefill_tokens_per_second:>9,.0f} tokens/s   "
            f"decode {point.decode_tokens_per_second:>7,.0f} tokens/s   "
            f"cache {point.cache_bytes / 2**20:>7.1f} MiB",
            flush=True,
        )
    return {
        "environment": build_report(),
        "recipes": {name: recipe.to_dict() for name, recipe in recipes.items()},
        "training_tokens_per_second": training,
        "generation": generation,
    }


def _training_rates(recipes: dict[str, RunConfig], args: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of optimiser steps on random tokens."""
    import dataclasses
    import functools

    import torch

    from sambay.data.batches import Batch
    from sambay.speed import fastest_seconds
    from sambay.train.config import Device
    from sambay.train.trainer import Trainer

    steps = {}
    for name, recipe in recipes.items():
        config = dataclasses.replace(recipe, device=Device(args.device))
        shape = (config.batch.global_batch_size, config.data.sequence_length + 1)
        ids_BT = torch.randint(config.model.vocab_size, shape)
        batch = Batch(ids_BT[:, :-1], ids_BT[:, 1:], None)
        steps[name] = functools.partial(Trainer(config).learn, batch, 1e-5, 0)
    seconds = fastest_seconds(steps, repeats=args.repeats)
    return {name: recipes[name].tokens_per_step / seconds[name] for name in recipes}
