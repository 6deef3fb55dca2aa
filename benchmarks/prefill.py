"""Prefill of a long prompt: the last token's logits against the full forward of the same model.

    python -m benchmarks.prefill --out build/benchmarks/prefill.json

Then, with `--long 32768`, a prompt into an engine's cache, chunk by chunk: SambaY against a
Transformer++ of equal size.

Time as a ratio within each round; FLOPs from torch's counter, whose share for the projections must
be the one computed from the configuration (arXiv 2507.06607, section 2: linear prefill).
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import peers
from benchmarks.measure import environment, interleaved, write_result
from sambay.generate.prefill import prefill
from sambay.model import LanguageModel, ModelCache
from sambay.model.model import Outputs
from sambay.spec import ModelConfig, footprint

CHUNK = 2048  # the engine's own
CONFIGS = {"SambaY": peers.sambay_20m, "Transformer++": peers.transformer_20m}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/prefill.json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--long", type=int, default=0, help="also so many tokens by the engine")
    parser.add_argument("--long-rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {
        name: compare(config(), args.tokens, args.rounds) for name, config in CONFIGS.items()
    }
    for name, result in results.items():
        print(f"\nprefill of {args.tokens} tokens, {name}, float32")
        print(f"  all logits          {result['seconds']['all']:7.2f} s")
        print(f"  last token's logits {result['seconds']['last']:7.2f} s")
        print(f"  share of the time   {result['time_share']:7.3f}")
        print(
            f"  share of the projections' FLOPs {result['flop_share']:.4f}, "
            f"by arithmetic {result['predicted_flop_share']:.4f}"
        )
    long = engines(args.long, args.long_rounds) if args.long else None
    if long is not None:
        seconds = ", ".join(f"{name} {one:.1f} s" for name, one in long["seconds"].items())
        print(f"\nprefill of {args.long} tokens by the engine: {seconds}")
        print(f"  SambaY takes {long['time_share']:.3f} of the Transformer++'s time")
    write_result(args.out, {"environment": environment(), "results": results, "engine": long})


@torch.inference_mode()
def engines(tokens: int, rounds: int) -> dict:
    """Seconds of the engine's prefill of one long prompt, and the share SambaY takes."""
    prompt_T = torch.randint(0, peers.VOCAB, (tokens,))
    prefills = {}
    for name, config in CONFIGS.items():
        model = LanguageModel(config()).eval()

        def fill(model: LanguageModel = model) -> object:
            cache = ModelCache.allocate(model.config, 1, tokens, torch.float32, "cpu")
            return prefill(model, [prompt_T], cache, CHUNK)

        prefills[name] = fill
    seconds = interleaved(prefills, rounds=rounds, warmup=0)
    ours, theirs = seconds["SambaY"], seconds["Transformer++"]
    return {
        "tokens": tokens,
        "chunk": CHUNK,
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "time_share": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        "rounds": rounds,
    }


@torch.inference_mode()
def compare(config: ModelConfig, tokens: int, rounds: int) -> dict:
    """Seconds and projection FLOPs of both forwards, and their ratios."""
    model = LanguageModel(config).eval()
    ids = torch.randint(0, config.vocab_size, (1, tokens))
    seconds = interleaved(
        {
            "all": lambda: model(ids),
            "hidden": lambda: model.hidden_states(ids),
            "last": lambda: model(ids, outputs="last"),
        },
        rounds=rounds,
        warmup=1,
    )

    def share(of: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds["last"], seconds[of], strict=True))

    return {
        "tokens": tokens,
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "time_share": share("all"),
        "time_share_without_head": share("hidden"),
        "flop_share": projection_flops(model, ids, "last") / projection_flops(model, ids, "all"),
        "predicted_flop_share": footprint.prefill_share(config),
    }


def projection_flops(model: LanguageModel, ids: torch.Tensor, outputs: Outputs) -> int:
    """FLOPs of the blocks' projections in one forward, by torch's counter.

    The counter does not know the fused attention of the CPU; every matrix product it sees is one
    of a Linear layer.
    """
    counter = FlopCounterMode(display=False)
    with counter:
        model.hidden_states(ids, outputs=outputs)
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
