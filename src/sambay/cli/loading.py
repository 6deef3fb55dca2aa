"""The model that `generate`, `chat` and `evaluate` work with: common options, and loading it."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sambay.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from sambay.generate.text import TextGenerator
    from sambay.hf.chat import ChatFormat

_WORTH_SAYING = 200_000_000  # bytes that take longer to load than it takes to wonder


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer.

    folder, tokenizer_folder: where settings beside the weights, and beside the tokenizer, are.
    """

    generator: TextGenerator
    folder: Path
    tokenizer_folder: Path

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end a text, as the folder says."""
        from sambay.hf.tokenizer import end_token_ids

        return end_token_ids(self.folder, self.generator.tokenizer)

    def chat_format(self, template: str | None) -> ChatFormat:
        """How conversations are written for this model; `template` is that of the option."""
        from sambay.hf.chat import ChatFormat, find_template

        found = find_template([self.folder, self.tokenizer_folder], template)
        return ChatFormat(self.generator.tokenizer, found)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options about loading and about what chats are."""
    add_loading_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="instructions at the start of a chat")


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options about loading and about how chats are written."""
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of weights (as they are stored)"
    )
    parser.add_argument(
        "--weights", choices=("int8", "int4"),
        help="make integers of the layers' matrices once they are loaded (needs torchao)",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1 (auto)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (all)")
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="a tokenizer.json or its folder (that of the model)"
    )
    parser.add_argument(
        "--template", metavar="NAME",
        help="how chats are written: phi4, or a file with a Jinja template (that of the model)",
    )  # fmt: skip


def require_positive(args: argparse.Namespace, *names: str) -> None:
    """Refuse numbers below 1 among the options.

    Raises:
        ConfigError: names the option.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} is {value}; it must be at least 1")


def load(args: argparse.Namespace, path: Path) -> LoadedModel:
    """The model in a native or official folder, run directory or checkpoint.

    Raises:
        SambayError: anything wrong with the folder, the tokenizer, the device or the memory.
    """
    import torch

    from sambay.generate import Engine, TextGenerator
    from sambay.hf.loading import is_model_folder
    from sambay.hf.tokenizer import find_tokenizer, load_tokenizer
    from sambay.train.export import load_checkpoint_model

    if args.weights is not None:
        from sambay.hf.quantisation import require_torchao

        require_torchao()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = find_device(args.device)
    given = None if args.tokenizer is None else Path(args.tokenizer)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    size = 0
    if is_model_folder(path):
        find_tokenizer(path, given)  # before the minutes that loading may take
        dtype, size = _checked_size(path, dtype, device)
    watched = size > _WORTH_SAYING and sys.stderr.isatty()
    if watched:
        print(f"loading {size / 1e9:.1f} GB from {path} ...", file=sys.stderr, flush=True)
    started = time.perf_counter()
    model, _, beside = load_checkpoint_model(path, dtype=dtype or torch.float32, device=device)
    if args.weights is not None:
        from sambay.hf.quantisation import quantise

        quantise(model, args.weights)
    if watched:
        print(f"loaded in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    folder = beside.parent
    file = find_tokenizer(folder, given)
    generator = TextGenerator(Engine(model), load_tokenizer(file, folder))
    return LoadedModel(generator, folder, file.parent)


def _checked_size(
    path: Path, dtype: torch.dtype | None, device: torch.device
) -> tuple[torch.dtype, int]:
    """The dtype to load a model folder in, and the bytes of its weights, which fit."""
    import math

    import torch

    from sambay.generate.memory import NotEnoughMemory, available_bytes, readable_bytes
    from sambay.model.weights import open_folder

    stored = open_folder(path).tensors.values()
    sizes = {tensor: math.prod(tensor.shape) for tensor in stored}
    if dtype is None:
        main = max(sizes, key=sizes.__getitem__).dtype if sizes else torch.float32
        dtype = main if main is torch.bfloat16 else torch.float32
    needed = sum(sizes.values()) * dtype.itemsize
    available = available_bytes(device)
    if available is not None and needed > available:
        raise NotEnoughMemory(
            f"the weights in {path} need {readable_bytes(needed)} of memory on {device} in "
            f"{str(dtype).removeprefix('torch.')}, {readable_bytes(available)} are available; "
            "use a machine with more memory" + ", or --dtype bfloat16" * (dtype.itemsize > 2)
        )
    return dtype, needed


def find_device(name: str) -> torch.device:
    """The device of `--device`; auto is CUDA where there is some.

    Raises:
        ConfigError: not a device, or none that is here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name} is not a device; say cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {name}: torch finds {torch.cuda.device_count()} CUDA devices; use cpu"
        )
    return device
