"""What the three stages share: options, loading, adapters, resuming, and the finished model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

from sambay.errors import ConfigError, SambayError
from sambay.hf.loading import read_config
from sambay.hf.lora import target_modules
from sambay.hf.tokenizer import find_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OPTIONS_FILE, CHECKPOINTS, ADAPTER = "finetune.json", "checkpoints", "adapter"


def parser(purpose: str, *, full: float, lora: float, length: int) -> argparse.ArgumentParser:
    """The options; `full` and `lora` are the learning rates of the two ways, `length` in tokens."""
    options = argparse.ArgumentParser(
        description=purpose, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("--model", type=Path, required=True, help="a model folder, native or official")
    add("--data", type=Path, required=True, help="a file of JSON lines")
    add("--out", type=Path, required=True, help="where checkpoints and the finished model go")
    add("--tokenizer", type=Path, help="a folder with one (default: the model folder)")
    add("--template", type=Path, help="a Jinja chat template (default: the tokenizer's own)")
    ways = options.add_mutually_exclusive_group()
    ways.add_argument("--lora", dest="lora", action="store_true", help="train adapters (default)")
    ways.add_argument("--full", dest="lora", action="store_false", help="train all parameters")
    options.set_defaults(lora=True)
    add("--rank", type=int, default=16, help="of the adapters (default %(default)s)")
    add(
        "--dtype", choices=DTYPES, help="while training (default the folder's, with --full float32)"
    )
    rates = f"(default {lora:g}, with --full {full:g})"
    add("--learning-rate", type=float, help=f"at the peak {rates}")
    add("--max-steps", type=int, default=-1, help="(default: by epochs)")
    add("--epochs", type=float, default=1.0, help="(default %(default)s)")
    add("--batch-size", type=int, default=1, help="rows at a time (default %(default)s)")
    add("--accumulate", type=int, default=16, help="such batches a step (default %(default)s)")
    add("--max-length", type=int, default=length, help="tokens of a row (default %(default)s)")
    add("--save-steps", type=int, default=100, help="(default %(default)s)")
    add("--seed", type=int, default=0)
    options.set_defaults(rates={False: full, True: lora})
    return options


def run(stage: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Fill in what depends on the way, run, and turn mistakes into one line."""
    args.learning_rate = args.learning_rate or args.rates[args.lora]
    try:
        _claim(args)
        stage(args)
    except SambayError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def load(args: argparse.Namespace, *, chat: bool) -> tuple[Any, Any, LoraConfig | None]:
    """The model, its tokenizer (with a chat template if `chat`), and adapters or None."""
    read_config(args.model)  # a folder that is none of ours is refused with a reason
    file = find_tokenizer(args.model, args.tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, padding_side="left")
    if args.template is not None:
        tokenizer.chat_template = args.template.read_text(encoding="utf-8")
    if chat and not tokenizer.chat_template:
        raise ConfigError(
            f"{file.parent} has no chat template; give one with --template FILE (Phi's is "
            "phi4.jinja beside this script)"
        )
    stored = getattr(AutoConfig.from_pretrained(args.model), "dtype", None)
    if args.dtype is None:
        args.dtype = "bfloat16" if args.lora and stored is torch.bfloat16 else "float32"
    args.result_dtype = torch.bfloat16 if args.dtype == "bfloat16" else stored or torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[args.dtype])
    largest = max(tokenizer.get_vocab().values())
    if largest >= model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer in {file.parent} has the id {largest}, the model only "
            f"{model.config.vocab_size} entries; give the tokenizer that belongs to it"
        )
    if not args.lora:
        if args.dtype != "float32":
            print("warning: --full in bfloat16 loses updates below 1/256 of a weight")
        return model, tokenizer, None
    # Our choice: twice the rank, the usual scale; every linear layer of every kind.
    modules = target_modules(model.config)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=args.rank, lora_alpha=2 * args.rank, target_modules=modules
    )
    return model, tokenizer, lora


def training_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What the configurations of all TRL trainers understand."""
    return {
        "output_dir": str(args.out / CHECKPOINTS),
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "max_steps": args.max_steps,
        "num_train_epochs": args.epochs,
        "per_device_train_batch_size": args.batch_size,
        "gradient_accumulation_steps": args.accumulate,
        "max_length": args.max_length,
        "save_steps": args.save_steps,
        "save_total_limit": 2,
        "logging_steps": 1,
        "seed": args.seed,
        "bf16": torch.cuda.is_available(),  # the arithmetic; the parameters keep their dtype
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
    }


def finish(trainer: Any, tokenizer: Any, args: argparse.Namespace) -> None:
    """Train, from the last checkpoint if there is one, and write a model folder to --out."""
    checkpoints = args.out / CHECKPOINTS
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    if last is not None:
        print(f"continuing from {last}")
    trainer.train(resume_from_checkpoint=last)
    if not trainer.is_world_process_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    if args.lora:
        model.save_pretrained(args.out / ADAPTER)
        model = model.merge_and_unload()
    model.to(args.result_dtype).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"finished: {args.out}")


def _claim(args: argparse.Namespace) -> None:
    """Refuse a folder with a finished model, or with a run of other options than these."""
    kept = vars(args).keys() - {"out", "rates"}
    options = {name: str(getattr(args, name)) for name in sorted(kept)}
    file = args.out / OPTIONS_FILE
    if (args.out / "config.json").exists():
        raise ConfigError(f"--out {args.out} holds a finished model; give another folder")
    if file.exists():
        before = json.loads(file.read_text())
        for name, value in options.items():
            if name != "save_steps" and before.get(name) != value:
                raise ConfigError(
                    f"--out {args.out} was started with {name} = {before.get(name)}, not {value}; "
                    "continue with the same options or give another folder"
                )
    args.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(options, indent=2))
