"""Convert models between formats.

    sambay convert SOURCE OUT --to native|official

SOURCE is a native model folder, an official Phi4Flash folder, or the .pth file of an ArchScale run.
Native and official folders convert into each other without the change of a bit. An ArchScale file
does not store all of its settings; what is missing is asked for.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sambay.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from sambay.model import LanguageModel
    from sambay.spec import ModelConfig

KINDS = ("native", "official", "archscale")
_SETTINGS = (
    "parametrization", "tied", "window", "rope_base", "num_heads", "num_kv_heads", "head_dim",
    "layer_pattern", "memory_source",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Register the options of `sambay convert`."""
    parser.add_argument("source", metavar="SOURCE", type=Path, help="a model folder or .pth file")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument("--to", required=True, choices=KINDS[:2], help="the format to write")
    parser.add_argument(
        "--from", dest="kind", choices=KINDS, help="the format of SOURCE (what it looks like)"
    )
    parser.add_argument(
        "--fold-multipliers",
        action="store_true",
        help="move multipliers into the weights; the official format has none",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the written weights (as in SOURCE); what the format keeps in float32 stays",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="tokenizer.json, or the folder it is in (that of SOURCE, if it has one)",
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of one file of weights (5GB)"
    )
    parser.add_argument("--force", action="store_true", help="replace the model folder OUT")
    group = parser.add_argument_group("settings an ArchScale file does not store")
    group.add_argument(
        "--parametrization", metavar="NAME", help="it was trained with: mup++, mup or standard"
    )
    tied = group.add_mutually_exclusive_group()
    tied.add_argument(
        "--tied", action="store_true", default=None,
        help="check that embedding and head are one matrix",
    )  # fmt: skip
    tied.add_argument(
        "--untied", dest="tied", action="store_false", help="check that they are two matrices"
    )
    group.add_argument("--window", type=int, metavar="N", help="visible positions, itself included")
    group.add_argument("--rope-base", type=float, metavar="X", help="of rotary positions; 0: none")
    group.add_argument("--num-heads", type=int, metavar="N", help="query heads")
    group.add_argument("--num-kv-heads", type=int, metavar="N", help="key and value heads")
    group.add_argument(
        "--head-dim", type=int, metavar="N", help="size of one head; one of these three is enough"
    )
    group.add_argument(
        "--layer-pattern", metavar="P", help="such as '4x(M S) M F 3x(G C)', if shapes do not tell"
    )
    group.add_argument(
        "--memory-source", metavar="NAME", help="mamba, attention or mlp, if shapes do not tell"
    )


def run(args: argparse.Namespace) -> None:
    """Read, convert and write, saying what is done.

    Raises:
        SambayError: anything wrong with the options or the files; OUT is as it was.
    """
    kind = args.kind or _kind_of(args.source)
    _check_options(args, kind)
    print(f"reading {args.source} as {kind}{'' if args.kind else ' (what it looks like)'}")

    import torch

    from sambay.hf import official
    from sambay.hf.folding import fold_multipliers, folded_config
    from sambay.model.folder import save_model_folder
    from sambay.model.weights_writer import parse_size
    from sambay.spec import footprint

    max_shard_bytes = parse_size(args.max_shard_size)
    tokenizer = _tokenizer(args, kind)
    model = _load(args, kind)
    config = model.config
    parameters = footprint.parameter_count(config)
    print(f"  {config.layer_pattern}, {parameters:,} parameters, {_short(model.head_weight.dtype)}")
    if args.to == "official":
        _check_official(config, args)
    if args.fold_multipliers:
        model = fold_multipliers(model)
        for name in ("residual", "logit", "embedding"):
            factor = getattr(config, f"{name}_multiplier")
            if factor != 1:
                print(f"  folding the {name} multiplier {factor:g} into the weights")
        if folded_config(config).attention_scale != config.attention_scale:
            print(f"  folding the attention scale {config.attention_scale:g} into the queries")
    if args.dtype is not None:
        model = model.to(getattr(torch, args.dtype))
    if args.to == "native":
        save_model_folder(args.out, model, tokenizer, max_shard_bytes=max_shard_bytes)
    else:
        _tell_rounding(model)
        extra = official.read(args.source)[1] if kind == "official" else None
        official.save(
            args.out,
            model,
            max_shard_bytes=max_shard_bytes,
            config_extra=extra,
            tokenizer_folder=None if tokenizer is None else tokenizer.parent,
        )
    size = sum(file.stat().st_size for file in args.out.glob("*.safetensors"))
    print(f"wrote {args.out} as {args.to}: {size:,} bytes, {_short(model.head_weight.dtype)}")
    if tokenizer is None:
        print("  without a tokenizer; --tokenizer PATH adds one")


def _kind_of(source: Path) -> str:
    from sambay.model.folder import CONFIG_FILE, read_json_object

    if not source.exists():
        raise ConfigError(f"{source} does not exist; give a model folder or a .pth file")
    if not source.is_dir():
        return "archscale"
    if not (source / CONFIG_FILE).exists():
        found = sorted(source.glob("*.pth"))
        hint = f"give the file itself, such as {found[0]}" if found else "it is no model folder"
        raise ConfigError(f"{source} holds no {CONFIG_FILE}; {hint}")
    official = read_json_object(source / CONFIG_FILE).get("model_type") == "phi4flash"
    return "official" if official else "native"


def _check_options(args: argparse.Namespace, kind: str) -> None:
    given = [name for name in _SETTINGS if getattr(args, name) is not None]
    if kind != "archscale" and given:
        option = given[0].replace("_", "-")
        raise ConfigError(
            f"--{option} is a setting of ArchScale files; a folder has it in config.json, "
            "change it there"
        )
    source = args.source.resolve()
    if args.out.resolve() in (source, *source.parents):
        raise ConfigError(f"{args.out} is or holds SOURCE; give another folder to write")
    if args.out.is_dir() and any(args.out.iterdir()) and not args.force:
        raise ConfigError(f"{args.out} is not empty; choose another folder or add --force")


def _tokenizer(args: argparse.Namespace, kind: str) -> Path | None:
    """The tokenizer.json to copy, if there is one."""
    from sambay.model.folder import TOKENIZER_FILE

    if args.tokenizer is not None:
        file = args.tokenizer / TOKENIZER_FILE if args.tokenizer.is_dir() else args.tokenizer
        if not file.is_file():
            raise ConfigError(f"--tokenizer: {file} does not exist; give a tokenizer.json")
        return file
    if kind == "archscale":
        return None
    file = args.source / TOKENIZER_FILE
    return file if file.exists() else None


def _load(args: argparse.Namespace, kind: str) -> LanguageModel:
    """The model in the dtype its weights are stored in."""
    from sambay.hf import archscale, official
    from sambay.hf.archscale_config import Settings
    from sambay.model.folder import load_model_folder
    from sambay.model.weights import open_folder

    if kind == "archscale":
        return archscale.load(args.source, Settings(**{n: getattr(args, n) for n in _SETTINGS}))
    name, load = {
        "native": ("model.embedding.weight", load_model_folder),
        "official": ("model.embed_tokens.weight", official.load),
    }[kind]
    stored = open_folder(args.source).tensors.get(name)
    if stored is None:  # loading says what is missing
        return load(args.source)
    return load(args.source, dtype=stored.dtype)


def _check_official(config: ModelConfig, args: argparse.Namespace) -> None:
    from sambay.hf import official
    from sambay.hf.folding import folded_config

    target = folded_config(config)
    official.describe(target)  # a reason that folding would not mend comes first
    difference = config.first_difference(target)
    if difference is not None and not args.fold_multipliers:
        name, found, _ = difference
        raise ConfigError(
            f"the official format has no multipliers and this model has {name} = {found:g}; "
            "add --fold-multipliers"
        )


def _tell_rounding(model: LanguageModel) -> None:
    """In memory these are float32 in every model; the official format has no such exception."""
    dtype = model.head_weight.dtype
    exact = all(
        tensor.to(dtype).to(tensor.dtype).equal(tensor)
        for name, tensor in model.named_parameters()
        if name.endswith(("mixer.D", "mixer.dt_bias"))
    )
    if not exact:
        print(
            f"  the official format stores D and dt_proj.bias of Mamba layers in {_short(dtype)}: "
            "some of them are rounded"
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
