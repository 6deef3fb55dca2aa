"""Mid-training: continue pre-training on the rollouts of a teacher, packed into full rows.

    python midtrain.py --model MODEL --data rollouts.jsonl --out OUT

A line is {"messages": [...]}, a whole conversation with its reasoning, or {"text": "..."}.
"""

from __future__ import annotations

import argparse

from rollouts import document, read
from stage import finish, load, parser, run, training_arguments
from trl import SFTConfig, SFTTrainer


def options() -> argparse.ArgumentParser:
    return parser(str(__doc__), full=1e-5, lora=1e-4, length=8192)


def midtrain(args: argparse.Namespace) -> None:
    dataset = read(args.data, document)
    model, tokenizer, lora = load(args, chat="messages" in dataset.column_names)
    # Every token is learned. Rows are filled with whole documents where possible and the model
    # keeps them apart; what is longer than a row is split, nothing is thrown away.
    config = SFTConfig(
        **training_arguments(args),
        packing=True,
        packing_strategy="bfd_split",
        shuffle_dataset=True,
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=lora,
    )
    finish(trainer, tokenizer, args)


if __name__ == "__main__":
    run(midtrain, options().parse_args())
