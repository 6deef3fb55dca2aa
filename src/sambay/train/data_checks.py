"""Whether a run can use its prepared sets, from their manifests alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sambay.data.manifest import TRAIN, VALIDATION, Manifest
from sambay.errors import ConfigError, DataError
from sambay.train.config import RunConfig


def check_data(config: RunConfig) -> tuple[Manifest, ...]:
    """The manifests of the training sets, once it is certain that this run can use them all.

    Raises:
        DataError: a set is not prepared, or has too few tokens for one sequence.
        ConfigError: the sets have different tokenizers, or another vocabulary than the model; one
            is named twice.
    """
    sources = config.data.sources
    folders: dict[Path, str] = {}
    manifests = []
    for source in sources:
        manifest = Manifest.read(Path(source.directory))
        where = Path(source.directory).resolve()
        if where in folders:
            raise ConfigError(
                f"data.mixture: {folders[where]} and {source.directory} are the same folder; add "
                "their weights up in one entry"
            )
        folders[where] = source.directory
        manifests.append(manifest)
        _check_same_tokenizer(source.directory, manifest, sources[0].directory, manifests[0])
    _check_vocabulary(config, sources[0].directory, manifests[0])
    length = config.data.sequence_length
    for source, manifest in zip(sources, manifests, strict=True):
        tokens = manifest.total(TRAIN, "tokens")
        if tokens <= length:
            raise DataError(
                f"data.sequence_length = {length}: the training split of {source.directory} has "
                f"{tokens} tokens, at least {length + 1} are needed; prepare more text or shorten "
                "the sequence"
            )
    _check_validation(config, manifests)
    return tuple(manifests)


def validation_folders(config: RunConfig, manifests: Sequence[Manifest]) -> dict[str, str]:
    """The names and folders of the sets that are measured on.

    Those of `evaluation.sets`; without them, the training sets that have validation tokens.
    """
    if config.evaluation.sets:
        return dict(config.evaluation.sets)
    named = zip(config.data.source_names, config.data.sources, manifests, strict=True)
    return {
        name: source.directory
        for name, source, manifest in named
        if manifest.total(VALIDATION, "tokens") >= 2
    }


def describe_data(config: RunConfig, manifests: Sequence[Manifest]) -> tuple[str, str]:
    """The (topic, text) line about the data."""
    total = config.num_steps * config.tokens_per_step
    parts = []
    for source, manifest in zip(config.data.sources, manifests, strict=True):
        available = manifest.total(TRAIN, "tokens")
        share = f"{source.weight:.4g} of " if len(manifests) > 1 else ""
        parts.append(
            f"{share}{source.directory}: {available:,} training tokens "
            f"({total * source.weight / available:.3g} epochs), "
            f"{manifest.total(VALIDATION, 'tokens'):,} validation tokens"
        )
    return "data", "; ".join(parts)


def _check_same_tokenizer(name: str, mine: Manifest, other_name: str, other: Manifest) -> None:
    if mine.tokenizer_sha256 != other.tokenizer_sha256:
        raise ConfigError(
            f"{name} and {other_name} were prepared with different tokenizers (sha256 "
            f"{mine.tokenizer_sha256[:12]} and {other.tokenizer_sha256[:12]}); prepare one of them "
            f"again with --tokenizer {other_name}"
        )
    if (mine.vocab_size, mine.eos_id) != (other.vocab_size, other.eos_id):
        raise ConfigError(
            f"{name} and {other_name} do not end documents with the same token ({mine.eos_token!r} "
            f"and {other.eos_token!r}); prepare one of them again with the other's --eos-token"
        )


def _check_vocabulary(config: RunConfig, folder: str, manifest: Manifest) -> None:
    if manifest.vocab_size != config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {config.model.vocab_size}, but the tokenizer in {folder} has "
            f"{manifest.vocab_size} entries; set model.vocab_size={manifest.vocab_size} or "
            f"prepare the data with --vocab-size {config.model.vocab_size}"
        )


def _check_validation(config: RunConfig, training: Sequence[Manifest]) -> None:
    folders = validation_folders(config, training)
    if not folders:
        names = " or ".join(repr(source.directory) for source in config.data.sources)
        raise DataError(
            f"data: {names} has no validation tokens; prepare it again with a larger "
            "--validation-fraction, or name other sets in evaluation.sets"
        )
    for name, folder in folders.items():
        manifest = Manifest.read(Path(folder))
        _check_same_tokenizer(folder, manifest, config.data.sources[0].directory, training[0])
        tokens = manifest.total(VALIDATION, "tokens")
        if tokens < 2:
            raise DataError(
                f"evaluation.sets.{name} = {folder!r} has no validation tokens; prepare it with a "
                "larger --validation-fraction (1: all of it)"
            )
        # A set shorter than the training length is one short row, as it always was.
        longest = max(config.evaluation.lengths)
        if longest > 1 and tokens <= longest * config.data.sequence_length:
            raise ConfigError(
                f"evaluation.lengths has {longest} x {config.data.sequence_length} tokens, but the "
                f"validation split of {folder} has {tokens}; leave that length out or hold out more"
            )
