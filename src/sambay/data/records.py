"""The texts of one record: a text field, or packed token ids that another tokenizer made.

Packed records, as long-context sets are published in, have `input_ids` (token ids of several
documents one after another) and `indices` (where each of them begins and ends). Each document is
decoded by itself; its special tokens, such as one that begins or ends a text, stand for nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from sambay.data.tokenizer import Tokenizer

IDS, INDICES = "input_ids", "indices"


class ReadingRules(NamedTuple):
    """How files are read.

    text_field: field or column of the text.
    document_separator: where plain texts are cut.
    max_document_bytes: longer texts are cut.
    only: (path of a field, value) that a record must have; the path goes into nested records.
    packed_tokenizer: path of the tokenizer that made the ids of packed records; None: texts.
    """

    text_field: str
    document_separator: str
    max_document_bytes: int
    only: tuple[tuple[tuple[str, ...], str], ...] = ()
    packed_tokenizer: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields a record is read for, without those of `only`."""
        return (self.text_field,) if self.packed_tokenizer is None else (IDS, INDICES)


def is_selected(record: Mapping[str, Any], rules: ReadingRules, counts: Counter[str]) -> bool:
    """Whether a record has the values asked for; one that has not is counted."""
    for path, wanted in rules.only:
        value: Any = record
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        if not isinstance(value, str | int) or str(value) != wanted:
            counts["not_selected"] += 1
            return False
    return True


def packed_texts(
    record: Mapping[str, Any], rules: ReadingRules, counts: Counter[str]
) -> Iterator[bytes]:
    """The documents of a packed record, as UTF-8.

    One that was cut inside a character loses the rest of that character.
    """
    assert rules.packed_tokenizer is not None
    if record.get(IDS) is None or record.get(INDICES) is None:
        note_missing(counts, record.keys())
        return
    try:
        ids = np.asarray(record[IDS])
        spans = np.asarray(record[INDICES])
        if spans.size == 0:
            return
        fits = (
            ids.ndim == 1
            and spans.ndim == 2
            and spans.shape[1] == 2
            and ids.dtype.kind in "iu"
            and spans.dtype.kind in "iu"
            and bool((spans[:, 0] <= spans[:, 1]).all())
            and int(spans.min()) >= 0
            and int(spans.max()) <= len(ids)
        )
    except ValueError:  # lists of unequal lengths
        fits = False
    if not fits:
        counts["invalid_records"] += 1
        return
    tokenizer = packed_tokenizer(rules.packed_tokenizer)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
        # Ids of another tokenizer would decode to nonsense.
        counts["unknown_ids"] += 1
        return
    for start, end in spans.tolist():
        yield _whole_characters(tokenizer.decode_bytes(ids[start:end].tolist()))


@lru_cache(maxsize=1)
def packed_tokenizer(path: str) -> Tokenizer:
    """The tokenizer that made the ids of packed records; `Tokenizer.load` says what it raises."""
    return Tokenizer.load(path)


def note_missing(counts: Counter[str], names: Iterable[Any]) -> None:
    """Count a record without text; the names it has help to word the error."""
    counts["missing_text"] += 1
    if not any(key.startswith("field:") for key in counts):
        for name in list(names)[:8]:
            counts[f"field:{name}"] += 1


def _whole_characters(data: bytes) -> bytes:
    """`data` without the halves of characters at its two ends."""
    start = 0
    while start < min(3, len(data)) and data[start] & 0xC0 == 0x80:
        start += 1
    for back in range(1, min(4, len(data) - start) + 1):
        first = data[-back]
        if first & 0xC0 == 0x80:
            continue
        needed = 4 if first >= 0xF0 else 3 if first >= 0xE0 else 2 if first >= 0xC0 else 1
        return data[start : len(data) - back] if needed > back else data[start:]
    return data[start:]
