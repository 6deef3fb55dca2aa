"""The manifest of a prepared set: what is in it, how it was made, and how to check it.

DIR/manifest.json is written last, so a folder with a manifest is a finished set.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sambay.errors import DataError
from sambay.files import write_json

MANIFEST_FILE = "manifest.json"
FORMAT = "sambay-tokens"
FORMAT_VERSION = 1
TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)
DTYPES = {"uint16": 2, "uint32": 4}
INDEX_ITEM_BYTES = 8


@dataclass(frozen=True)
class Shard:
    """One token file with its index of document ends beside it.

    `file` is relative to the set's folder; `bytes` counts the UTF-8 of the raw texts.
    """

    file: str
    tokens: int
    documents: int
    bytes: int
    sha256: str
    index_sha256: str

    @property
    def index_file(self) -> str:
        return self.file.removesuffix(".bin") + ".idx"


@dataclass(frozen=True)
class Manifest:
    """All that is known about a prepared set.

    `byte_level`: every token stands for fixed bytes and the tokens give back the texts exactly.
    """

    vocab_size: int
    eos_id: int
    eos_token: str
    dtype: str
    tokenizer_sha256: str
    byte_level: bool
    settings: dict[str, Any]
    sources: tuple[dict[str, Any], ...]
    counts: dict[str, int]
    splits: dict[str, tuple[Shard, ...]]

    def total(self, split: str, field: str) -> int:
        """The sum of `tokens`, `documents` or `bytes` over the shards of a split."""
        return sum(getattr(shard, field) for shard in self.splits[split])

    def to_dict(self) -> dict[str, Any]:
        """The content of manifest.json."""
        splits = {
            split: {
                "tokens": self.total(split, "tokens"),
                "documents": self.total(split, "documents"),
                "bytes": self.total(split, "bytes"),
                "shards": [dataclasses.asdict(shard) for shard in shards],
            }
            for split, shards in self.splits.items()
        }
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("splits", "sources")
        }
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **fields,
            "sources": list(self.sources),
            "splits": splits,
        }

    @classmethod
    def from_dict(cls, content: Any, name: str) -> Manifest:
        """The inverse of `to_dict`; `name` is the file an error message shall name."""
        remedy = "prepare the data again with --force"
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise DataError(f"{name} is not the manifest of a prepared set; {remedy}")
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise DataError(
                f"{name} has format version {version}, this sambay reads {FORMAT_VERSION}; "
                f"install the matching version or {remedy}"
            )
        values: dict[str, Any] = {
            field.name: content.get(field.name) for field in dataclasses.fields(cls)
        }
        missing = [key for key, value in values.items() if value is None]
        if missing:
            raise DataError(f"{name} is damaged: field {missing[0]!r} is missing; {remedy}")
        try:
            values["sources"] = tuple(values["sources"])
            values["splits"] = {
                split: tuple(Shard(**shard) for shard in values["splits"][split]["shards"])
                for split in SPLITS
            }
        except (TypeError, KeyError) as error:
            raise DataError(f"{name} is damaged ({error}); {remedy}") from error
        if values["dtype"] not in DTYPES:
            raise DataError(f"{name} is damaged: dtype {values['dtype']!r} is unknown; {remedy}")
        return cls(**values)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest in `folder`.

        Raises:
            DataError: there is none (nothing prepared, or not finished), or it is damaged.
        """
        path = folder / MANIFEST_FILE
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise DataError(
                f"{folder} has no {MANIFEST_FILE}: not prepared, or not finished; "
                f"run (again): sambay prepare SOURCE... --out {folder}"
            ) from error
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; check its permissions") from error
        except ValueError as error:
            raise DataError(
                f"{path} is damaged: {error}; prepare the data again with --force"
            ) from error
        return cls.from_dict(content, str(path))

    def write(self, folder: Path) -> None:
        """Write DIR/manifest.json atomically; the same content gives the same bytes."""
        write_json(folder / MANIFEST_FILE, self.to_dict())


def fingerprint(folder: Path) -> str:
    """SHA-256 of manifest.json, which through the checksums in it stands for the whole set."""
    return hashlib.sha256((folder / MANIFEST_FILE).read_bytes()).hexdigest()
