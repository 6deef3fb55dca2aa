"""SFT: learn the answers of curated conversations, one to a row.

    python sft.py --model MODEL --data conversations.jsonl --out OUT

A line is {"messages": [...]}; the last message, of the assistant, is what is learned.
"""

from __future__ import annotations

import argparse

from rollouts import answer, drop_long, read
from stage import finish, load, parser, run, training_arguments
from trl import SFTConfig, SFTTrainer


def options() -> argparse.ArgumentParser:
    return parser(str(__doc__), full=1e-5, lora=1e-4, length=16_384)


def sft(args: argparse.Namespace) -> None:
    dataset = read(args.data, answer)
    model, tokenizer, lora = load(args, chat=True)
    dataset = drop_long(dataset, tokenizer, args.max_length, "completion")
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**training_arguments(args), packing=False, completion_only_loss=True),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=lora,
    )
    finish(trainer, tokenizer, args)


if __name__ == "__main__":
    run(sft, options().parse_args())
