"""A whole evaluation of long prompts against the engine's bare prefill of the same tokens.

    python -m benchmarks.evaluation --out build/benchmarks/evaluation.json
    python -m benchmarks.evaluation --context 2048 --questions 8 --rounds 1

Phone books of `--context` tokens, 20 new tokens, the 20 M recipe with random weights. A round is
the evaluation (reading and encoding prompts, prefill, decoding, judging, keeping every answer) and,
in turn, a prefill of the same prompts one after another with nothing around it; the ratio is that
of their prompt tokens per second within a round.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import environment, interleaved, print_table, write_result
from sambay.data.tokenizer import Tokenizer
from sambay.errors import ConfigError
from sambay.evals.backends.engine import EngineBackend
from sambay.evals.backends.prompts import Prompts
from sambay.evals.suites.phonebook import PhonebookSuite
from sambay.generate import Engine, TextGenerator
from sambay.generate.engine import Timings
from sambay.model import LanguageModel, ModelCache
from sambay.recipes.catalogue import find_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/evaluation.json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--recipe", default="sambay_20m")
    parser.add_argument("--context", type=int, default=32_768)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--batch-size", type=int, help="rows at once (what the backend takes)")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = measure(args.recipe, args.context, args.questions, args.batch_size, args.rounds)
    rates = result["tokens_per_second"]
    print_table(
        ("prompt tokens/s", str(result["tokens"] // args.questions)),
        [(name, f"{rate:,.0f}") for name, rate in rates.items()],
    )
    print(f"evaluation / prefill: {result['ratio']:.3f}")
    for name, share in result["shares"].items():
        print(f"  {name:<8} {share:6.1%} of the evaluation")
    write_result(args.out, {"environment": environment(), "arguments": _words(args), **result})


def measure(
    recipe: str, context: int, questions: int, batch_size: int | None, rounds: int
) -> dict[str, Any]:
    """Prompt tokens per second of both, their ratio, and where the evaluation's time went."""
    config = find_recipe(recipe)[1].model
    model = LanguageModel(config).eval()
    suite, tokenizer = books(context, questions, config.vocab_size)
    prompts = [tokenizer.encode(item.call.prompt) for item in suite.items()]
    engine = Engine(model)
    backend = EngineBackend(
        TextGenerator(engine, tokenizer),
        Prompts(tokenizer, frozenset(), ConfigError("no chats here")),
        {"name": recipe},
        batch_size=batch_size,
    )

    def evaluate() -> None:
        engine.timings = Timings()
        with tempfile.TemporaryDirectory() as folder:
            suite.evaluate(backend, Path(folder))

    def prefill() -> None:
        for prompt in prompts:
            bare_prefill(model, prompt, engine.prefill_chunk)

    seconds = interleaved(
        {"prefill": prefill, "evaluation": evaluate}, rounds=rounds, warmup=int(rounds > 1)
    )
    tokens = sum(map(len, prompts))
    pairs = zip(seconds["prefill"], seconds["evaluation"], strict=True)
    last, timings = seconds["evaluation"][-1], engine.timings
    known = {"prefill": timings.prefill_seconds / last, "decode": timings.decode_seconds / last}
    return {
        "tokens": tokens,
        "tokens_per_second": {
            name: tokens / statistics.median(times) for name, times in seconds.items()
        },
        "ratio": statistics.median(bare / whole for bare, whole in pairs),
        "seconds": seconds,
        "shares": {**known, "rest": 1 - sum(known.values())},
    }


@torch.inference_mode()
def bare_prefill(model: LanguageModel, prompt: list[int], chunk: int) -> None:
    """The logits behind one prompt, and nothing else."""
    ids_BT = torch.tensor([prompt])
    cache = ModelCache.allocate(model.config, 1, len(prompt), torch.float32, "cpu")
    for begin in range(0, len(prompt), chunk):
        is_last = begin + chunk >= len(prompt)
        model(ids_BT[:, begin : begin + chunk], cache=cache, outputs="last" if is_last else "none")


def books(context: int, questions: int, vocab_size: int) -> tuple[PhonebookSuite, Tokenizer]:
    """Questions of at most `context` tokens, and a tokenizer made for them."""
    suite = PhonebookSuite(pairs=(100,), groups=1, batches=1, prompts=questions)
    text = suite.items()[0].call.prompt
    tokenizer = Tokenizer.train([text], vocab_size)
    pairs = 100 * context // len(tokenizer.encode(text))
    while True:
        suite = dataclasses.replace(suite, pairs=(pairs,))
        longest = max(len(tokenizer.encode(item.call.prompt)) for item in suite.items())
        if longest <= context:
            return suite, tokenizer
        pairs -= max(1, pairs * (longest - context) // longest)


def _words(args: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) for name, value in vars(args).items() if name != "out"}


if __name__ == "__main__":
    main()
