"""The choices of `sambay prepare` that decide what is written."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from sambay.data.records import ReadingRules, packed_tokenizer
from sambay.errors import ConfigError

# 256 bytes and the end-of-sequence token.
SMALLEST_VOCAB = 257
SMALLEST_DOCUMENT_LIMIT = 64


@dataclass(frozen=True)
class PrepareSettings:
    """What to read and how to write it; the same settings and sources give the same bytes.

    Exactly one of `vocab_size` (train a tokenizer of that size) and `tokenizer` (path of a
    tokenizer.json or its folder) is given.

    Attributes:
        eos_token: end-of-sequence token of `tokenizer`, where its files do not name it.
        text_field: field of JSON lines, column of Parquet files.
        include, exclude: glob patterns for files found in folders.
        validation_fraction: share of the documents in the validation split, chosen by a hash of
            their content.
        shard_tokens: approximate tokens per shard; None: 64 shards of 1 to 256 MiB of text.
        max_document_bytes: longer texts are cut at a line break into several documents.
        document_separator: where plain texts are cut into documents; "" for one per file.
        only: "FIELD=VALUE", which a record must have to be read; FIELD may be a.b for nested ones.
        packed_tokenizer: path of the tokenizer that made the ids of packed records (`input_ids`
            and `indices`), which are decoded and tokenized again; None: records have texts.
    """

    vocab_size: int | None = None
    tokenizer: str | None = None
    eos_token: str | None = None
    text_field: str = "text"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    validation_fraction: float = 0.01
    shard_tokens: int | None = None
    max_document_bytes: int = 16 << 20
    document_separator: str = ""
    only: tuple[str, ...] = ()
    packed_tokenizer: str | None = None

    def __post_init__(self) -> None:
        if (self.vocab_size is None) == (self.tokenizer is None):
            raise ConfigError(
                "give one of --vocab-size N (train a tokenizer) and --tokenizer PATH (use one)"
            )
        if self.vocab_size is not None:
            if self.vocab_size < SMALLEST_VOCAB:
                raise ConfigError(
                    f"--vocab-size {self.vocab_size} is too small; it must be at least "
                    f"{SMALLEST_VOCAB} (256 bytes and the end of text)"
                )
            if self.eos_token is not None:
                raise ConfigError(
                    "--eos-token belongs to --tokenizer; a trained tokenizer has its own, drop it"
                )
        strings = (
            self.text_field,
            self.document_separator,
            *self.include,
            *self.exclude,
            *self.only,
        )
        for text in strings:
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise ConfigError(f"{text!r} is not valid UTF-8; give it in that encoding")
        if not 0 <= self.validation_fraction <= 1:
            raise ConfigError(
                f"--validation-fraction {self.validation_fraction} must be from 0 to 1"
            )
        if self.validation_fraction == 1 and self.vocab_size is not None:
            raise ConfigError(
                "--validation-fraction 1 leaves no text to train a tokenizer on; give --tokenizer "
                "with that of the training set"
            )
        for text in self.only:
            if not all(text.partition("=")):
                raise ConfigError(f"--only {text!r} is not of the form FIELD=VALUE; write it so")
        if self.shard_tokens is not None and self.shard_tokens < 1:
            raise ConfigError(f"--shard-tokens {self.shard_tokens} must be at least 1")
        if self.max_document_bytes < SMALLEST_DOCUMENT_LIMIT:
            raise ConfigError(
                f"--max-document-bytes {self.max_document_bytes} must be at least "
                f"{SMALLEST_DOCUMENT_LIMIT}"
            )

    @property
    def reading(self) -> ReadingRules:
        pairs = [text.partition("=") for text in self.only]
        return ReadingRules(
            self.text_field,
            self.document_separator,
            self.max_document_bytes,
            tuple((tuple(field.split(".")), value) for field, _, value in pairs),
            self.packed_tokenizer,
        )

    def record(self) -> dict[str, Any]:
        """The settings as the manifest keeps them, where fingerprints stand for tokenizers."""
        fields = dataclasses.asdict(self)
        del fields["tokenizer"], fields["eos_token"]
        # Sets made before there were these choices have no record of them.
        only, packed = fields.pop("only"), fields.pop("packed_tokenizer")
        if only:
            fields["only"] = sorted(set(only))
        if packed is not None:
            fields["packed_tokenizer"] = packed_tokenizer(packed).sha256
        return {
            **fields,
            "include": sorted(set(self.include)),
            "exclude": sorted(set(self.exclude)),
        }
