"""Measure throughput and latency of long generation under load, for models with random weights.

The experiment of arXiv 2507.06607, figures 4 and 9, at any scale: each of so many clients sends its
next request when the last one is answered. A model is a name (see below) or a config.json. Models
take turns in every round, and ratios are taken within rounds. What was measured is kept in the
folder, so that the same command goes on where an earlier one stopped.

examples:
  sambay bench generation --models sambay-20m transformer++-20m --divide 32 --out runs/speed
  sambay bench generation --models phi4-mini-flash phi4-mini --baseline phi4-mini \\
      --dtype bfloat16 --device cuda --out runs/flash-speed
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sambay.errors import ConfigError
from sambay.spec import ModelConfig
from sambay.spec.named import NAMED, named

if TYPE_CHECKING:
    from sambay.studies.generation import GenerationPlan

LENGTHS = ["2000/32000", "32000/500"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `sambay bench generation`."""
    parser.epilog = f"models:\n  {', '.join(NAMED)}"
    add = parser.add_argument
    add("--models", nargs="+", required=True, metavar="MODEL", help="names or config.json files")
    add("--baseline", metavar="MODEL", help="what ratios are taken to (the last model)")
    add("--lengths", nargs="+", default=LENGTHS, metavar="PROMPT/GENERATED",
        help="mean tokens (2000/32000 32000/500)")  # fmt: skip
    add("--divide", type=int, default=1, metavar="N", help="make all lengths N times shorter (1)")
    add("--spread", type=float, default=0.3, metavar="SHARE",
        help="standard deviation of lengths over their mean (0.3)")  # fmt: skip
    add("--concurrency", nargs="+", type=int, default=[1, 2, 4, 8, 16], metavar="N",
        help="clients (1 2 4 8 16)")  # fmt: skip
    add("--requests", type=int, default=2, metavar="N",
        help="requests of each client on average (2)")  # fmt: skip
    add("--rounds", type=int, default=3, metavar="N", help="repetitions, other lengths drawn (3)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and cache")
    add("--weights", choices=("int8", "int4"), help="of the layers' matrices (as --dtype says)")
    add("--device", default="cpu", metavar="NAME", help="cpu or cuda (cpu)")
    add("--threads", type=int, metavar="N", help="CPU threads (all)")
    add("--prefill-chunk", type=int, default=2048, metavar="N", help="tokens per prefill (2048)")
    add("--seed", type=int, default=0, metavar="N", help="of lengths and prompts (0)")
    add("--out", type=Path, required=True, metavar="DIR", help="where results are kept")
    add("--dry-run", action="store_true", help="say what would be measured and what it needs")


def run(args: argparse.Namespace) -> int:
    """Measure what is missing and write results.json, results.md and pictures; 0.

    Raises:
        ConfigError: an unknown model, length or device, a number out of range, or a folder with
            measurements of another plan.
        MissingPackage: weights are to be quantised, and torchao is not installed.
        NotEnoughMemory: something would not fit; names what would. Nothing was measured.
    """
    import torch

    from sambay.hf.quantisation import require_torchao
    from sambay.studies.generation_run import PointsFile, require_memory_for, run_plan

    if args.device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {args.device} is unknown; use cpu or cuda")
    if args.device == "cuda" and not torch.cuda.is_available() and not args.dry_run:
        raise ConfigError("--device cuda: torch sees no CUDA device; use cpu")
    for name, value in (("--threads", args.threads), ("--divide", args.divide)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value} is too small; it must be at least 1")
    if args.weights is not None:
        require_torchao()
    configs = dict(_find_model(text) for text in args.models)
    plan = _plan(args, tuple(configs))
    baseline = args.baseline or plan.models[-1]
    if baseline not in configs:
        raise ConfigError(f"--baseline {baseline} is not among --models; name it there too")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.dry_run:
        _describe(plan, configs)
        return 0
    require_memory_for(plan, configs)
    file = PointsFile(args.out, plan, configs)
    run_plan(plan, configs, file, said=lambda text: print(text, flush=True))
    _write(args.out, plan, configs, file.points, baseline)
    return 0


def _find_model(text: str) -> tuple[str, ModelConfig]:
    if not text.endswith(".json"):
        return text, named(text)
    import json

    path = Path(text)
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--models {text}: no readable JSON file ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--models {text}: no model configuration; give a config.json")
    try:
        config = ModelConfig.from_dict(values.get("model", values))  # of a run, or of a model alone
    except ConfigError as error:
        raise ConfigError(f"--models {text}: {error}") from error
    return path.stem if path.stem != "config" else path.resolve().parent.name, config


def _plan(args: argparse.Namespace, models: tuple[str, ...]) -> GenerationPlan:
    from sambay.studies.generation import GenerationPlan, Lengths

    if len(models) < len(args.models):
        raise ConfigError("--models: one is named twice; leave one of them out")
    return GenerationPlan(
        models=models,
        lengths=tuple(Lengths.parse(text).divided(args.divide) for text in args.lengths),
        concurrencies=tuple(sorted(set(args.concurrency))),
        requests=args.requests,
        rounds=args.rounds,
        spread=args.spread,
        seed=args.seed,
        dtype=args.dtype,
        weights=args.weights,
        device=args.device,
        prefill_chunk=args.prefill_chunk,
    )


def _describe(plan: GenerationPlan, configs: dict[str, ModelConfig]) -> None:
    from sambay.generate.memory import readable_bytes
    from sambay.spec.footprint import parameter_count
    from sambay.studies.generation_run import weight_bytes

    print(f"{sum(1 for _ in plan.keys)} measurements in {plan.rounds} rounds, {plan.numbers}")
    for name, config in configs.items():
        weights = readable_bytes(weight_bytes(plan, config))
        print(f"{name}: {parameter_count(config):,} parameters, {weights}, {config.layer_pattern}")
        for lengths in plan.lengths:
            needs = ", ".join(
                f"{c}: {readable_bytes(plan.slots_bytes(config, lengths, c))}"
                for c in plan.concurrencies
            )
            print(f"  {lengths}  memory by clients {needs}")


def _write(
    out: Path,
    plan: GenerationPlan,
    configs: dict[str, ModelConfig],
    points: list[dict[str, Any]],
    baseline: str,
) -> None:
    from sambay.cli.doctor import build_report
    from sambay.errors import MissingPackage
    from sambay.files import atomic_write, write_json
    from sambay.plots.canvas import save
    from sambay.plots.generation import draw_generation
    from sambay.studies.generation_report import Measured, markdown, summarise
    from sambay.studies.generation_run import plan_values

    summary = summarise(Measured(plan, points), baseline)
    report = build_report()
    command = shlex.join(["sambay", *sys.argv[1:]])
    write_json(
        out / "results.json",
        {
            "command": command,
            "environment": report,
            "plan": plan_values(plan, configs),
            "summary": summary,
            "points": points,
        },
    )
    modes = sorted({point["step_mode"] for point in points})
    machine = next(line for line in report["devices"] if line["name"].startswith(plan.device))
    about = [
        f"`{command}`",
        "",
        f"{machine['value']}, {plan.numbers}, random weights; {plan.rounds} rounds in which the "
        f"models take turns, lengths normal with a spread of {plan.spread:.0%}, "
        f"{plan.requests} requests per client; decode steps {', '.join(modes)}.",
    ]
    page = markdown(summary, about)
    with atomic_write(out / "results.md") as file:
        file.write(page.encode())
    print(f"\n{page}\nwritten to {out}")
    try:
        for lengths, models in summary["lengths"].items():
            figure = draw_generation(models, lengths, f"{machine['value']}, {plan.numbers}")
            for suffix in (".png", ".svg"):
                save(figure, out / f"generation_{lengths.replace('/', '_')}{suffix}")
    except MissingPackage as error:  # the numbers are there; pictures can be drawn elsewhere
        print(f"no pictures: {error}")
