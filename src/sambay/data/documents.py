"""The documents of one file: text, JSON lines, Parquet and packed ids, plain or compressed.

A document is a non-blank text. What cannot be one is counted by reason, never guessed at:
    binary            a text with a NUL byte
    empty             nothing but white space
    undecodable       more than 1 % of the bytes are not UTF-8
    repaired          at most 1 % are not UTF-8: kept, each bad sequence replaced by U+FFFD
    undecodable_bytes the number of bytes so replaced
    invalid_records   a line that is no JSON object
    missing_text      a record without a text in the field asked for
    cut               a text longer than the limit, cut at line breaks into several documents
    not_selected      a record with other values than asked for
    unknown_ids       a packed record with ids that its tokenizer has not
    no_records        a file without records where packed ones are read
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

from sambay.data.packed_files import DamagedError, read_mds, read_npz
from sambay.data.records import ReadingRules, is_selected, note_missing, packed_texts
from sambay.data.sources import JSONL, MDS, NPZ, PARQUET, SourceFile
from sambay.data.streams import open_stream
from sambay.errors import DataError, MissingPackage

_BLOCK = 1 << 20
_SNIFF = 1 << 13
_UNDECODABLE_SHARE = 0.01
_ROWS = 256


class Document(NamedTuple):
    """A text and the place from which reading it can start again.

    `offset` is in bytes of the uncompressed file, or in rows for Parquet; documents cut from one
    record share it.
    """

    offset: int
    text: str


class UnreadableFileError(DataError):
    """A file that cannot be opened or is damaged; its documents are left out as a whole."""


def read_documents(
    file: SourceFile,
    rules: ReadingRules,
    counts: Counter[str],
    *,
    offset: int = 0,
    on_read: Callable[[int], None] | None = None,
) -> Iterator[Document]:
    """The documents of a file from `offset` on; adds to `counts` what was left out or changed.

    `on_read` is told the bytes taken from the disk, except for Parquet.

    Raises:
        UnreadableFileError: the operating system refuses, or the content is damaged.
        MissingPackage: the format needs a package that is not installed.
    """
    try:
        if file.kind == PARQUET:
            yield from _read_parquet(file, rules, counts, offset)
        else:
            with open_stream(file.path, file.compression, on_read) as stream:
                if rules.packed_tokenizer is not None and file.kind != JSONL:
                    yield from _read_packed(stream, file.kind, rules, counts, offset)
                    return
                _skip(stream, file, offset)
                read = _read_lines if file.kind == JSONL else _read_texts
                yield from read(stream, rules, counts, offset)
    except (OSError, EOFError, zlib.error, DamagedError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableFileError(f"{file.path}: {reason}") from error


def cut_texts(data: bytes, limit: int) -> Iterator[bytes]:
    """`data` in pieces of at most `limit` bytes, cut after a line break where there is one.

    Never cuts inside a character of valid UTF-8.
    """
    start = 0
    while len(data) - start > limit:
        end = cut_position(data, start, limit)
        yield data[start:end]
        start = end
    yield data[start:] if start else data


def cut_position(data: bytes, start: int, limit: int) -> int:
    """Where a piece that begins at `start` and may have `limit` bytes should end."""
    end = data.rfind(b"\n", start, start + limit) + 1
    if end > start:
        return end
    end = start + limit
    while end > start + limit - 3 and end > start + 1 and data[end] & 0xC0 == 0x80:
        end -= 1
    return end if data[end] & 0xC0 != 0x80 else start + limit


def _accept(data: bytes, counts: Counter[str]) -> str | None:
    """The text of a document, or None if it is counted out."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        bad = len(data) - len(data.decode("utf-8", "ignore").encode())
        if bad > _UNDECODABLE_SHARE * len(data):
            counts["undecodable"] += 1
            return None
        text = data.decode("utf-8", "replace")
        counts["repaired"] += 1
        counts["undecodable_bytes"] += bad
    if not text or text.isspace():
        counts["empty"] += 1
        return None
    return text


def _pieces(data: bytes, rules: ReadingRules, counts: Counter[str]) -> Iterator[str]:
    if len(data) > rules.max_document_bytes:
        counts["cut"] += 1
    for piece in cut_texts(data, rules.max_document_bytes):
        text = _accept(piece, counts)
        if text is not None:
            yield text


def _skip(stream: BinaryIO, file: SourceFile, offset: int) -> None:
    if not file.compression:
        stream.seek(offset)
        return
    while offset:
        block = stream.read(min(offset, _BLOCK))
        if not block:
            raise EOFError("shorter than when it was first read")
        offset -= len(block)


def _read_texts(
    stream: BinaryIO, rules: ReadingRules, counts: Counter[str], offset: int
) -> Iterator[Document]:
    separator, limit = rules.document_separator.encode(), rules.max_document_bytes
    data, ended, beginning = b"", False, offset == 0
    cutting = False
    while True:
        # Enough is read to see whether a piece of `limit` bytes ends with a whole separator.
        while not ended and len(data) <= limit + len(separator):
            block = stream.read(max(_BLOCK, limit))
            ended = not block
            data += block
            if beginning and block:
                beginning = False
                if b"\0" in block[:_SNIFF]:
                    counts["binary"] += 1
                    return
        start, total = 0, len(data)
        if not total:
            if offset == 0:
                counts["empty"] += 1
            return
        while start < total and (ended or total - start > limit + len(separator)):
            found = data.find(separator, start, start + limit + len(separator)) if separator else -1
            if found >= 0:
                end, after, cut = found, found + len(separator), False
            elif total - start > limit:
                end = after = cut_position(data, start, limit)
                cut = True
            else:
                end = after = total
                cut = False
            piece = data[start:end]
            counts["cut"] += cut and not cutting
            cutting = cut
            if b"\0" in piece:
                counts["binary"] += 1
            elif piece or not separator:
                text = _accept(piece, counts)
                if text is not None:
                    yield Document(offset + start, text)
            start = after
        data, offset = data[start:], offset + start
        if ended and not data:
            return


def _read_lines(
    stream: BinaryIO, rules: ReadingRules, counts: Counter[str], offset: int
) -> Iterator[Document]:
    for line in stream:
        here, offset = offset, offset + len(line)
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except UnicodeDecodeError:
            # The line is judged as a text is; what is left of it may still be a good record.
            text = _accept(line, counts)
            if text is None:
                continue
            record = _parse(text)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            counts["invalid_records"] += 1
            continue
        for text in _record_texts(record, rules, counts):
            yield Document(here, text)


def _read_packed(
    stream: BinaryIO, kind: str, rules: ReadingRules, counts: Counter[str], offset: int
) -> Iterator[Document]:
    read = {MDS: read_mds, NPZ: read_npz}.get(kind)
    if read is None:
        counts["no_records"] += 1
        return
    for number, record in enumerate(read(stream.read(), offset), start=offset):
        for text in _record_texts(record, rules, counts):
            yield Document(number, text)


def _record_texts(
    record: dict[str, Any], rules: ReadingRules, counts: Counter[str]
) -> Iterator[str]:
    if not is_selected(record, rules, counts):
        return
    if rules.packed_tokenizer is not None:
        for data in packed_texts(record, rules, counts):
            yield from _pieces(data, rules, counts)
        return
    value = record.get(rules.text_field)
    if isinstance(value, str):
        yield from _pieces(_encode(value), rules, counts)
    else:
        note_missing(counts, record.keys())


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _encode(value: str) -> bytes:
    # JSON may hold half of a surrogate pair, which is no text; it counts as undecodable later.
    return value.encode("utf-8", "surrogatepass")


def _read_parquet(
    file: SourceFile, rules: ReadingRules, counts: Counter[str], offset: int
) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackage("pyarrow", f"reading {file.path}", "data") from error
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            names = table.schema_arrow.names
            if not set(rules.columns) <= set(names):
                counts["missing_text"] += table.metadata.num_rows - 1
                note_missing(counts, names)
                return
            needed = [path[0] for path, _ in rules.only if path[0] in names]
            row, groups = 0, list(range(table.num_row_groups))
            while groups and row + table.metadata.row_group(groups[0]).num_rows <= offset:
                row += table.metadata.row_group(groups.pop(0)).num_rows
            columns = list(dict.fromkeys((*rules.columns, *needed)))
            for batch in table.iter_batches(_ROWS, row_groups=groups, columns=columns):
                for record in _rows(batch, rules, needed, pyarrow):
                    if row >= offset and is_selected(record, rules, counts):
                        for data in _row_texts(record, rules, counts, names):
                            for text in _pieces(data, rules, counts):
                                yield Document(row, text)
                    row += 1
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UnreadableFileError(f"{file.path}: {reason}") from error


def _rows(
    batch: Any, rules: ReadingRules, needed: list[str], pyarrow: Any
) -> Iterator[dict[str, Any]]:
    columns = {name: batch.column(name).to_pylist() for name in needed}
    for name in rules.columns:
        column = batch.column(name)
        texts = rules.packed_tokenizer is None
        columns[name] = _as_bytes(column, pyarrow) if texts else column.to_pylist()
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def _row_texts(
    record: dict[str, Any], rules: ReadingRules, counts: Counter[str], names: list[str]
) -> Iterator[bytes]:
    if rules.packed_tokenizer is not None:
        yield from packed_texts(record, rules, counts)
    elif record[rules.text_field] is None:
        note_missing(counts, names)
    else:
        yield record[rules.text_field]


def _as_bytes(column: Any, pyarrow: Any) -> list[bytes | None]:
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (
        pyarrow.types.is_string(column.type)
        or pyarrow.types.is_large_string(column.type)
        or pyarrow.types.is_binary(column.type)
        or pyarrow.types.is_large_binary(column.type)
    ):
        return [None] * len(column)
    return column.cast(pyarrow.large_binary()).to_pylist()
