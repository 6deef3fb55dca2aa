"""The backends that `sambay evaluate` can use: their options, and opening one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sambay.cli.loading import find_device, load, require_positive
from sambay.errors import ConfigError

if TYPE_CHECKING:
    from sambay.evals.backends.prompts import Prompts
    from sambay.evals.backends.rehearsal import Rehearsal
    from sambay.evals.backends.server import ServerBackend
    from sambay.evals.calls import Backend

BACKENDS = ("engine", "transformers", "server")


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that exclude each other.

    Raises:
        ConfigError: names the option.
    """
    require_positive(args, "batch_size", "max_context", "threads")
    if (args.url is None) != (args.backend != "server"):
        raise ConfigError(
            "--url is for --backend server; give both or neither"
            if args.url is not None
            else "--backend server needs --url, such as http://127.0.0.1:8000"
        )
    if args.weights is not None and args.backend != "engine":
        raise ConfigError(f"--weights is for --backend engine; {args.backend} has its own")
    if args.backend == "server":
        for option, value in (("dtype", args.dtype), ("threads", args.threads)):
            if value is not None:
                raise ConfigError(f"--{option} is for models that run here; the server has its own")
        if args.device != "auto":
            raise ConfigError("--device is for models that run here; the server has its own")
        if args.template is not None and args.tokenizer is None:
            raise ConfigError(
                "--template needs --tokenizer with --backend server, to measure chats"
            )


def open_backend(args: argparse.Namespace, model: str) -> Backend:
    """The backend of the options, its model loaded.

    Raises:
        SambayError: no such model, anything wrong with it, or a server that does not answer.
    """
    if args.backend == "server":
        return _open_server(args, model)[0]
    from sambay.evals.backends.identity import model_name, resolve_model, weights_sha256

    path = resolve_model(Path(model))
    limits = {"batch_size": args.batch_size, "max_context": args.max_context}
    if args.backend == "transformers":
        import torch

        from sambay.evals.backends.transformers import TransformersBackend, load_transformers

        if args.threads is not None:
            torch.set_num_threads(args.threads)
        loaded, prompts = load_transformers(
            path,
            tokenizer=None if args.tokenizer is None else Path(args.tokenizer),
            template=args.template,
            dtype=None if args.dtype is None else getattr(torch, args.dtype),
            device=find_device(args.device),
        )
        facts = {"name": model_name(Path(model)), "weights_sha256": weights_sha256(path)}
        return TransformersBackend(loaded, prompts, facts, **limits)
    from sambay.evals.backends.engine import EngineBackend
    from sambay.evals.backends.prompts import open_prompts

    ours = load(args, path)
    prompts = open_prompts(
        ours.generator.tokenizer, ours.folder, ours.tokenizer_folder, args.template
    )
    facts = {"name": model_name(Path(model)), "weights_sha256": weights_sha256(path)}
    if args.weights is not None:  # other answers than those of the weights in the files
        facts["weights"] = args.weights
    return EngineBackend(ours.generator, prompts, facts, **limits)


def open_rehearsal(args: argparse.Namespace, model: str) -> Rehearsal:
    """What stands in for the backend of the options where only prompts are looked at.

    Raises:
        SambayError: no such model, or anything wrong with its tokenizer.
    """
    from sambay.evals.backends.identity import beside, model_name, resolve_model
    from sambay.evals.backends.rehearsal import Rehearsal

    if args.backend == "server":
        server, prompts = _open_server(args, model)
        limit = server.max_context
    else:
        prompts = _prompts(args, beside(resolve_model(Path(model))))
        limit = prompts.max_context if args.max_context is None else args.max_context
    return Rehearsal(prompts, model_name(Path(model)), limit)


def _open_server(args: argparse.Namespace, model: str) -> tuple[ServerBackend, Prompts | None]:
    from sambay.evals.backends.json_client import JsonClient
    from sambay.evals.backends.server import ServerBackend

    prompts = None if args.tokenizer is None else _prompts(args, Path(args.tokenizer))
    client = JsonClient(args.url)
    settings = {"requests": args.batch_size, "max_context": args.max_context}
    return ServerBackend(client, model, prompts, **settings), prompts


def _prompts(args: argparse.Namespace, folder: Path) -> Prompts:
    """The text side of the model in a folder, or beside a tokenizer."""
    from sambay.evals.backends.prompts import open_prompts
    from sambay.hf.tokenizer import find_tokenizer, load_tokenizer

    file = find_tokenizer(folder, None if args.tokenizer is None else Path(args.tokenizer))
    folder = folder if folder.is_dir() else file.parent
    return open_prompts(load_tokenizer(file, folder), folder, file.parent, args.template)
