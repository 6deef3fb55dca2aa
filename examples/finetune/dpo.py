"""DPO: prefer correct rollouts to incorrect ones of the same question.

    python dpo.py --model MODEL --data pairs.jsonl --out OUT

A line is {"prompt": "...", "chosen": "...", "rejected": "..."}; the prompt may be a list of
messages. The reference is the model as it was given.
"""

from __future__ import annotations

import argparse

from rollouts import drop_long, preference, read
from stage import finish, load, parser, run, training_arguments
from trl import DPOConfig, DPOTrainer


def options() -> argparse.ArgumentParser:
    words = parser(str(__doc__), full=5e-7, lora=5e-6, length=16_384)
    words.add_argument("--beta", type=float, default=0.1, help="how far it may move (0.1)")
    return words


def dpo(args: argparse.Namespace) -> None:
    dataset = read(args.data, preference)
    model, tokenizer, lora = load(args, chat=True)
    dataset = drop_long(dataset, tokenizer, args.max_length, "chosen", "rejected")
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**training_arguments(args), beta=args.beta),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=lora,
    )
    finish(trainer, tokenizer, args)


if __name__ == "__main__":
    run(dpo, options().parse_args())
