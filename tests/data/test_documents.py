from __future__ import annotations

import gzip
import io
import json
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from sambay.data import documents
from sambay.data.documents import ReadingRules, UnreadableFileError, cut_texts, read_documents
from sambay.data.sources import SourceFile, classify
from sambay.data.streams import ZstdReader

LIMIT = 1 << 20


def read(
    path: Path, *, field: str = "text", separator: str = "", limit: int = LIMIT, offset: int = 0
) -> tuple[list[tuple[int, str]], dict[str, int]]:
    counts: Counter[str] = Counter()
    file = SourceFile(str(path), *classify(path.name), path.stat().st_size, 0, 0)
    rules = ReadingRules(field, separator, limit)
    documents = read_documents(file, rules, counts, offset=offset)
    found = [(document.offset, document.text) for document in documents]
    return found, {key: n for key, n in counts.items() if n and not key.startswith("field:")}


def texts(path: Path, **options) -> list[str]:
    return [text for _, text in read(path, **options)[0]]


def write(path: Path, data: bytes) -> Path:
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


SUFFIXES = ["", ".gz", ".zst"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_text_is_one_document_byte_for_byte(tmp_path: Path, suffix: str) -> None:
    text = "\ufeffdéf f():\r\n\treturn '🙂'\n\n"
    path = write(tmp_path / f"a.py{suffix}", text.encode())
    assert read(path) == ([(0, text)], {})


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_json_lines_count_what_they_cannot_use(tmp_path: Path, suffix: str) -> None:
    lines = [
        b'{"text": "one", "id": 1}',
        b"",
        b'{"id": 2}',
        b'{"text": null}',
        b'{"text": 7}',
        b"[1, 2]",
        b"{broken",
        b"[" * 100_000,
        b'{"text": "  \\n"}',
        '{"text": "zwei ü"}'.encode(),
        b'{"text": "half \\ud800 pair"}',
        b'{"text": "latin ' + b"\xe9" * 50 + b'"}',
        b'{"text": "long enough to be kept ' + b"x" * 200 + b'\xe9"}',
    ]
    path = write(tmp_path / f"a.jsonl{suffix}", b"\n".join(lines))
    found, counts = read(path)
    assert [text for _, text in found][:2] == ["one", "zwei ü"]
    assert len(found) == 3
    assert found[2][1].endswith("x\ufffd")
    assert counts == {
        "missing_text": 3,
        "invalid_records": 3,
        "empty": 1,
        "undecodable": 2,
        "repaired": 1,
        "undecodable_bytes": 1,
    }


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_reading_can_start_at_any_document(tmp_path: Path, suffix: str) -> None:
    lines = [json.dumps({"text": f"text {n} é" * (n + 1)}) for n in range(30)]
    path = write(tmp_path / f"a.jsonl{suffix}", "\n".join(lines).encode())
    found, _ = read(path)
    for number in (0, 1, 17, 29):
        assert read(path, offset=found[number][0])[0] == found[number:]


def test_parquet_of_all_text_types_and_row_groups(tmp_path: Path) -> None:
    values = [f"text {n} é" for n in range(700)]
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.binary()):
        column = pyarrow.array([v.encode() for v in values], pyarrow.binary()).cast(kind)
        table = pyarrow.table({"n": pyarrow.array(range(700)), "body": column})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=150)
        found, counts = read(tmp_path / "a.parquet", field="body")
        assert found == list(enumerate(values))
        assert not counts
    assert read(tmp_path / "a.parquet", field="body", offset=433)[0] == found[433:]
    categories = pyarrow.array(["a b", "c d", "a b"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": categories}), tmp_path / "d.parquet")
    assert texts(tmp_path / "d.parquet") == ["a b", "c d", "a b"]


def test_parquet_counts_what_it_cannot_use(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["a", None, " "], "n": [1, 2, 3]})
    pyarrow.parquet.write_table(table, path)
    assert read(path) == ([(0, "a")], {"missing_text": 1, "empty": 1})
    assert read(path, field="n") == ([], {"missing_text": 3})
    assert read(path, field="other") == ([], {"missing_text": 3})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b" \n\t \r\n", "empty"),
        (b"text\0with nul", "binary"),
        ("caf\xe9 cr\xe8me".encode("latin-1"), "undecodable"),
        ("wide".encode("utf-16"), "binary"),
    ],
)
def test_what_is_no_text_is_counted(tmp_path: Path, data: bytes, reason: str) -> None:
    assert read(write(tmp_path / "a.txt", data)) == ([], {reason: 1})


def test_few_undecodable_bytes_are_replaced_and_counted(tmp_path: Path) -> None:
    good = "é" * 200
    path = write(tmp_path / "a.txt", good.encode() + b"\xff\xc3" + good.encode())
    assert read(path) == (
        [(0, good + "\ufffd\ufffd" + good)],
        {"repaired": 1, "undecodable_bytes": 2},
    )


def test_nul_bytes_in_records_are_text(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.jsonl", b'{"text": "a\\u0000b"}')) == ["a\0b"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_long_texts_are_cut_at_line_breaks(tmp_path: Path, suffix: str) -> None:
    lines = [f"line {n} " + "é" * (n % 40) + "\n" for n in range(500)]
    path = write(tmp_path / f"a.txt{suffix}", "".join(lines).encode())
    found, counts = read(path, limit=300)
    assert counts == {"cut": 1}
    assert "".join(text for _, text in found) == "".join(lines)
    assert all(text.endswith("\n") and len(text.encode()) <= 300 for _, text in found)
    for number in (1, 7, len(found) - 1):
        assert read(path, limit=300, offset=found[number][0])[0] == found[number:]
    record = write(tmp_path / f"a.jsonl{suffix}", json.dumps({"text": "".join(lines)}).encode())
    assert [text for _, text in read(record, limit=300)[0]] == [text for _, text in found]


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_separators_cut_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(documents, "_BLOCK", block)
    parts = ["first é story", "second\n", "", "x" * 150, "last"]
    path = write(tmp_path / "a.txt", "<|end|>".join(parts).encode() + b"<|end|>")
    found, counts = read(path, separator="<|end|>", limit=100)
    assert [text for _, text in found] == [*parts[:2], "x" * 100, "x" * 50, "last"]
    assert counts == {"cut": 1}
    for number in range(len(found)):
        assert (
            read(path, separator="<|end|>", limit=100, offset=found[number][0])[0]
            == (found[number:])
        )


@settings(deadline=None, max_examples=60)
@given(st.text(alphabet="aé🙂\n", min_size=1, max_size=80), st.integers(4, 20))
def test_cut_pieces_join_to_the_whole_and_stay_decodable(text: str, limit: int) -> None:
    pieces = list(cut_texts(text.encode(), limit))
    assert b"".join(pieces).decode() == text
    for piece in pieces:
        assert 0 < len(piece) <= limit
        piece.decode()


@settings(deadline=None, max_examples=60)
@given(st.binary(min_size=1, max_size=60), st.integers(4, 9))
def test_cutting_always_moves_on(data: bytes, limit: int) -> None:
    pieces = list(cut_texts(data, limit))
    assert b"".join(pieces) == data
    assert all(0 < len(piece) <= limit for piece in pieces)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_damaged_files_are_an_error_that_names_them(tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / name
    generator = __import__("random").Random(0)
    rows = ["".join(generator.choices("abcdefgh", k=200)) for _ in range(500)]
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path)
    else:
        write(path, "\n".join(json.dumps({"text": row}) for row in rows).encode())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"not that" * 99)
    with pytest.raises(UnreadableFileError, match=name):
        read(path)


def test_zstd_frames_follow_one_another(tmp_path: Path) -> None:
    frames = b"".join(zstandard.compress(f'{{"text": "part {n}"}}\n'.encode()) for n in range(5))
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    assert texts(tmp_path / "a.jsonl.zst") == [f"part {n}" for n in range(5)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_bytes_read_from_the_disk_are_told(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a.txt{suffix}", b"some text\n" * 5000)
    told: list[int] = []
    file = SourceFile(str(path), *classify(path.name), 0, 0, 0)
    rules = ReadingRules("text", "", LIMIT)
    assert len(list(read_documents(file, rules, Counter(), on_read=told.append))) == 1
    assert sum(told) == path.stat().st_size


def test_zstd_reader_gives_small_reads(tmp_path: Path) -> None:
    data = bytes(range(256)) * 50
    path = write(tmp_path / "a.zst", data)
    with io.BufferedReader(ZstdReader(path.open("rb")), 16) as stream:
        assert b"".join(iter(lambda: stream.read(3), b"")) == data
