"""Training steps of about 20 M parameters: ours against each other and against transformers.

    python -m benchmarks.training --out build/benchmarks/training.json

Every round measures one step of each model in turn; ratios are taken within a round, so that a
machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.measure import environment, interleaved, write_result

SUBJECT = "SambaY"
MODELS = {
    SUBJECT: lambda: peers.ours(peers.sambay_20m()),
    "Transformer++": lambda: peers.ours(peers.transformer_20m()),
    "transformers Llama": peers.llama,
    "transformers Jamba": peers.jamba,
}
SETTINGS = (
    # batch, columns, models, rounds; Jamba's fallback scan needs a minute per step
    (4, 512, (SUBJECT, "Transformer++", "transformers Llama"), 7),
    (1, 4096, (SUBJECT, "Transformer++", "transformers Llama"), 3),
    (4, 512, (SUBJECT, "transformers Jamba"), 1),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/training.json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--without-jamba", action="store_true", help="skip the slow peer")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    results = []
    for batch, columns, names, rounds in SETTINGS[: 2 if args.without_jamba else 3]:
        results.append(compare(batch, columns, names, rounds))
        report(results[-1])
    write_result(args.out, {"environment": environment(), "results": results})


def compare(batch: int, columns: int, names: tuple[str, ...], rounds: int) -> dict:
    """Tokens per second of each model, and the subject's speed as a multiple of each."""
    ids = torch.randint(0, peers.VOCAB, (batch, columns + 1))
    steps, sizes = {}, {}
    for name in names:
        torch.manual_seed(0)
        model, forward = MODELS[name]()
        sizes[name] = peers.parameters(model)
        steps[name] = peers.training_step(model, forward, ids)
    seconds = interleaved(steps, rounds=rounds, warmup=1 if rounds > 1 else 0)
    return {
        "batch": batch,
        "columns": columns,
        "rounds": rounds,
        "parameters": sizes,
        "tokens_per_second": {
            name: batch * columns / statistics.median(times) for name, times in seconds.items()
        },
        "speed_against": {
            name: statistics.median(
                theirs / mine for theirs, mine in zip(times, seconds[SUBJECT], strict=True)
            )
            for name, times in seconds.items()
            if name != SUBJECT
        },
    }


def report(result: dict) -> None:
    """Print one setting as a table."""
    print(f"\ntraining step, batch {result['batch']} x {result['columns']}, float32")
    for name, rate in result["tokens_per_second"].items():
        ratio = result["speed_against"].get(name)
        note = "" if ratio is None else f"   {SUBJECT} is {ratio:.2f} x as fast"
        print(f"  {name:20s} {result['parameters'][name] / 1e6:5.1f} M {rate:9.0f} tokens/s{note}")


if __name__ == "__main__":
    main()
