"""Training steps by several processes with one thread each, against one process with as many.

    python -m benchmarks.distributed --out build/benchmarks/distributed.json

The model of about 20 million parameters and the batch are the same; the processes share them by
FSDP over gloo. Both stay alive and take turns, one step each, and ratios are taken within a turn,
so that a machine that slows down slows both. The wanted ratio is at least 0.9.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.measure import environment, write_result
from sambay.data.batches import Batch
from sambay.train.config import (
    BatchConfig,
    DataConfig,
    OptimizerConfig,
    Precision,
    RunConfig,
    ScheduleConfig,
)
from sambay.train.distributed import joined
from sambay.train.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/distributed.json"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--columns", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--worker", type=int, metavar="THREADS", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        work(args)
        return
    teams = {
        "one process": Team(args, size=1, threads=args.processes),
        f"{args.processes} processes": Team(args, size=args.processes, threads=1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in teams}
    for turn in range(-2, args.rounds):
        for name, team in teams.items():
            taken = team.step()
            if turn >= 0:
                seconds[name].append(taken)
    for team in teams.values():
        team.end()
    one, many = seconds.values()
    ratio = statistics.median(first / second for first, second in zip(one, many, strict=True))
    tokens = args.rows * args.columns
    for name, times in seconds.items():
        print(f"  {name:14s} {tokens / statistics.median(times):9.0f} tokens/s")
    print(f"  {args.processes} processes have {ratio:.2f} x the speed of one")
    settings = {name: getattr(args, name) for name in ("processes", "rows", "columns", "precision")}
    write_result(
        args.out,
        {"environment": environment(), **settings, "ratio": ratio, "seconds": seconds},
    )


class Team:
    """Processes that make one training step together whenever they are told to."""

    def __init__(self, args: argparse.Namespace, *, size: int, threads: int) -> None:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "benchmarks.distributed", "--worker", str(threads)]
        for name in ("rows", "columns", "precision"):
            command += [f"--{name}", str(getattr(args, name))]
        common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        common |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        self._members = [
            subprocess.Popen(
                command,
                env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]

    def step(self) -> float:
        """The seconds of one step, of its slowest process."""
        for member in self._members:
            assert member.stdin is not None
            member.stdin.write("step\n")
            member.stdin.flush()
        answers = []
        for member in self._members:
            assert member.stdout is not None
            answers.append(float(member.stdout.readline()))
        return max(answers)

    def end(self) -> None:
        """Let the processes go."""
        for member in self._members:
            member.communicate()


def work(args: argparse.Namespace) -> None:
    """Make a step for every line that comes in, and answer with its seconds."""
    torch.set_num_threads(args.worker)
    config = RunConfig(
        model=peers.sambay_20m(),
        data=DataConfig("random tokens", sequence_length=args.columns),
        optimizer=OptimizerConfig(peak_learning_rate=1e-4),
        schedule=ScheduleConfig(10**9),
        batch=BatchConfig(args.rows, args.rows),
        precision=Precision(args.precision),
    )
    ids = torch.randint(
        0, peers.VOCAB, (args.rows, args.columns + 1), generator=torch.Generator().manual_seed(0)
    )
    with joined(config) as world:
        trainer = Trainer(config, world)
        rows = world.rows(args.rows)
        batch = Batch(ids[rows, :-1], ids[rows, 1:], None)
        for _ in sys.stdin:
            began = time.perf_counter()
            trainer.learn(batch, 1e-4, 0)
            print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
