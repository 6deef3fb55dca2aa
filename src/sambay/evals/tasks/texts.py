"""Documents of the user's own: files, folders, or the validation split of a prepared data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from sambay.data.documents import read_documents
from sambay.data.manifest import MANIFEST_FILE, VALIDATION
from sambay.data.records import ReadingRules
from sambay.data.shards import TokenDataset
from sambay.data.sources import JSONL, PARQUET, TEXT, list_files
from sambay.errors import DataError

LONGEST = 1 << 24
"""Bytes after which a document is cut; reading takes as much memory at once."""


def read_texts(
    source: Path, out: Path, *, field: str = "text", limit: int | None = None
) -> list[str]:
    """The documents of a file or folder, in the order of the files' names.

    A text file is one document; of JSON lines and parquet each row is one, in `field`. A folder
    with a prepared data set gives the documents of its validation split.

    Raises:
        DataError: nothing there, nothing that can be read, or a prepared set whose tokens do not
            give back its texts.
        MissingPackage: a format needs a package that is not installed.
    """
    prepared = (source / MANIFEST_FILE).is_file()
    documents = _prepared(source) if prepared else _files(source, out, field)
    texts = list(islice(documents, limit))
    if not texts:
        raise DataError(
            f"{source} holds no text; give text files, JSON lines or parquet with a field "
            f"'{field}', or a prepared data set"
        )
    return texts


def _files(source: Path, out: Path, field: str) -> Iterator[str]:
    listing = list_files([source], include=(), exclude=(), out=out)
    rules = ReadingRules(field, "", LONGEST)
    counts: Counter[str] = Counter()
    for file in listing.files:
        if file.kind in (TEXT, JSONL, PARQUET):
            for document in read_documents(file, rules, counts):
                yield document.text


def _prepared(folder: Path) -> Iterator[str]:
    dataset = TokenDataset.open(folder, VALIDATION)
    if not dataset.manifest.byte_level:
        raise DataError(
            f"{folder}: the tokens of this prepared set do not give back its texts exactly; give "
            "the texts it was prepared from"
        )
    for number in range(dataset.num_documents):
        yield dataset.tokenizer.decode(dataset.document(number)[:-1].tolist())
