"""Reading prepared sets: tokens of a split as one long array, memory-mapped, and their text."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sambay.data.manifest import (
    DTYPES,
    INDEX_ITEM_BYTES,
    SPLITS,
    Manifest,
    Shard,
    fingerprint,
)
from sambay.data.tokenizer import TOKENIZER_FILE, Tokenizer
from sambay.errors import DataError, nearest
from sambay.files import sha256_of

_REMEDY = "restore it from a copy, or prepare the data again with --force"


class TokenDataset:
    """One split of a prepared set: documents one after another, each ended by `eos_id`.

    Opening compares file sizes with the manifest and reads no tokens; `verify` reads everything.
    Can be pickled; the copy opens the same folder.

    Attributes:
        folder, split: what was opened; `manifest` is its description.
        num_tokens, num_documents, text_bytes: of the split (bytes: UTF-8 of the raw texts).
        manifest_hash: fingerprint of the whole set.
    """

    def __init__(self, folder: Path, split: str) -> None:
        """Open; see `open` for the errors raised."""
        self.folder = folder
        self.split = split
        self.manifest = Manifest.read(folder)
        self.manifest_hash = fingerprint(folder)
        if split not in SPLITS:
            raise DataError(f"split {split!r} is unknown{nearest(split, SPLITS)}")
        self._shards = self.manifest.splits[split]
        if not self._shards:
            raise DataError(
                f"{folder} has no {split} documents; prepare it again with another "
                "--validation-fraction"
            )
        for shard in self._shards:
            self._check_size(shard.file, shard.tokens * DTYPES[self.manifest.dtype])
            self._check_size(shard.index_file, shard.documents * INDEX_ITEM_BYTES)
        self.num_tokens = self.manifest.total(split, "tokens")
        self.num_documents = self.manifest.total(split, "documents")
        self.text_bytes = self.manifest.total(split, "bytes")
        self._token_ends = np.cumsum([shard.tokens for shard in self._shards])
        self._document_ends = np.cumsum([shard.documents for shard in self._shards])
        self._maps: dict[str, np.ndarray] = {}

    @classmethod
    def open(cls, folder: str | os.PathLike[str], split: str) -> TokenDataset:
        """The split "train" or "validation" of the set in `folder`.

        Raises:
            DataError: no finished set, a missing or truncated shard (named), an unknown or empty
                split.
        """
        return cls(Path(folder), split)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenDataset, (self.folder, self.split)

    @property
    def vocab_size(self) -> int:
        return self.manifest.vocab_size

    @property
    def eos_id(self) -> int:
        return self.manifest.eos_id

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) as a new array of the stored dtype (uint16 or uint32)."""
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise DataError(
                f"tokens {start} to {start + count} are not in the {self.split} split of "
                f"{self.folder}, which has {self.num_tokens}"
            )
        result = np.empty(count, self.manifest.dtype)
        number = int(np.searchsorted(self._token_ends, start, side="right"))
        done = 0
        while done < count:
            shard = self._shards[number]
            offset = start + done - int(self._token_ends[number]) + shard.tokens
            take = min(count - done, shard.tokens - offset)
            result[done : done + take] = self._tokens(shard)[offset : offset + take]
            done += take
            number += 1
        return result

    def document(self, number: int) -> np.ndarray:
        """The tokens of one document, its end-of-sequence token included."""
        if not 0 <= number < self.num_documents:
            raise DataError(
                f"document {number} is not in the {self.split} split of {self.folder}, "
                f"which has {self.num_documents}"
            )
        at = int(np.searchsorted(self._document_ends, number, side="right"))
        shard = self._shards[at]
        ends = self._map(shard.index_file, "<i8")
        local = number - int(self._document_ends[at]) + shard.documents
        start = int(ends[local - 1]) if local else 0
        return np.array(self._tokens(shard)[start : int(ends[local])], self.manifest.dtype)

    def document_ends(self) -> np.ndarray:
        """The position after each document's last token in the split, int64, in order."""
        shard_starts = [0, *self._token_ends[:-1].tolist()]
        ends = [
            start + self._map(shard.index_file, "<i8")
            for start, shard in zip(shard_starts, self._shards, strict=True)
        ]
        return np.concatenate(ends).astype(np.int64)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The set's tokenizer.

        Raises:
            DataError: tokenizer.json is not the one the tokens were made with.
        """
        tokenizer = Tokenizer.load(self.folder, self.manifest.eos_token)
        self.check_tokenizer(tokenizer, str(self.folder / TOKENIZER_FILE))
        return tokenizer

    def check_tokenizer(self, tokenizer: Tokenizer, name: str) -> None:
        """Raise DataError unless `tokenizer`, which comes from `name`, made these tokens."""
        if tokenizer.sha256 != self.manifest.tokenizer_sha256:
            raise DataError(
                f"{name} is not the tokenizer {self.folder} was prepared with "
                f"(sha256 {tokenizer.sha256[:12]}, the manifest says "
                f"{self.manifest.tokenizer_sha256[:12]}); {_REMEDY}"
            )

    def text(self, start: int, count: int) -> bytes:
        """The bytes of text that tokens [start, start + count) stand for; documents are joined.

        Exact for byte-level tokenizers, also where the range begins or ends inside a character.
        """
        return self.tokenizer.decode_bytes(self.read(start, count).tolist())

    def count_bytes(self, start: int, count: int) -> int:
        """The length of `text(start, count)`, without building it for byte-level tokenizers."""
        return self.tokenizer.count_bytes(self.read(start, count))

    def verify(self) -> None:
        """Read every file of the split and compare its checksum.

        Raises:
            DataError: names the first file that differs.
        """
        for shard in self._shards:
            self._check_sum(shard.file, shard.sha256)
            self._check_sum(shard.index_file, shard.index_sha256)

    def _tokens(self, shard: Shard) -> np.ndarray:
        return self._map(shard.file, np.dtype(self.manifest.dtype).newbyteorder("<"))

    def _map(self, file: str, dtype: Any) -> np.ndarray:
        if file not in self._maps:
            try:
                self._maps[file] = np.memmap(self.folder / file, dtype, "r")
            except OSError as error:
                raise DataError(f"{self.folder / file}: {error.strerror}; {_REMEDY}") from error
        return self._maps[file]

    def _check_size(self, file: str, expected: int) -> None:
        path = self.folder / file
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; {_REMEDY}") from error
        if size != expected:
            raise DataError(
                f"{path} is damaged: {size} bytes, the manifest says {expected}; {_REMEDY}"
            )

    def _check_sum(self, file: str, expected: str) -> None:
        path = self.folder / file
        try:
            found = sha256_of(path)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; {_REMEDY}") from error
        if found != expected:
            raise DataError(f"{path} is damaged: its checksum differs; {_REMEDY}")
