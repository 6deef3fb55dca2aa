"""Sets published as records: by domain, and as packed ids of another tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sambay.data.packed_files import DamagedError, read_mds
from sambay.data.prepare import prepare
from sambay.data.records import _whole_characters
from sambay.data.settings import PrepareSettings
from sambay.data.shards import TokenDataset
from sambay.data.tokenizer import Tokenizer
from sambay.errors import ConfigError, DataError
from tests.data.corpus import contents

DOCUMENTS = [
    "The first text.",
    "日本 and héllo 🙂",
    "def f(x):\n    return x\n",
    "four " * 40,
    "五",
]


def texts_of(folder: Path, split: str = "train") -> list[str]:
    dataset = TokenDataset.open(folder, split)
    found = [dataset.document(number) for number in range(dataset.num_documents)]
    assert all(tokens[-1] == dataset.eos_id for tokens in found)
    return [dataset.tokenizer.decode(tokens.tolist()) for tokens in found]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer the packed ids are of."""
    folder = tmp_path_factory.mktemp("old")
    Tokenizer.train([*DOCUMENTS, "nothing else"] * 3, 290).save(folder)
    return folder


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new")
    Tokenizer.train(["quite other words, and 日本"] * 3, 270).save(folder)
    return folder


def pack(tokenizer: Tokenizer, documents: list[str], *, whole: bool = True) -> dict[str, Any]:
    """Documents one after another, each ended; the last one cut if not `whole`."""
    ids: list[int] = []
    indices = []
    for document in documents:
        own = [*tokenizer.encode(document), tokenizer.eos_id]
        if not whole and document is documents[-1]:
            own = own[: len(own) // 2]
        indices.append([len(ids), len(ids) + len(own)])
        ids += own
    return {"input_ids": ids, "indices": indices, "domain": "books", "length": len(ids)}


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_parquet(path: Path, records: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=1)
    return path


def write_npz(path: Path, records: list[dict[str, Any]]) -> Path:
    (record,) = records
    np.savez(path, input_ids=record["input_ids"], indices=record["indices"])
    return path


def write_mds(path: Path, records: list[dict[str, Any]]) -> Path:
    """An MDS shard, after the format's description: a column of each kind of array."""
    columns = {
        "input_ids": "ndarray:uint32",
        "indices": "ndarray",
        "domain": "str",
        "length": "int",
    }
    about = {
        "column_encodings": list(columns.values()),
        "column_names": list(columns),
        "column_sizes": [None, None, None, 8],
        "format": "mds",
        "version": 2,
    }
    header = json.dumps(about).encode()
    samples = []
    for record in records:
        ids = np.array(record["input_ids"], "<u4")
        indices = np.array(record["indices"], "<i8")
        parts = [
            bytes([1 << 2 | 1]) + np.array(ids.shape, "<u2").tobytes() + ids.tobytes(),
            bytes([65, 2 << 2 | 0]) + np.array(indices.shape, "u1").tobytes() + indices.tobytes(),
            record["domain"].encode(),
            np.int64(record["length"]).tobytes(),
        ]
        sizes = np.array([len(part) for part in parts[:3]], "<u4").tobytes()
        samples.append(sizes + b"".join(parts))
    first = 4 + 4 * (len(samples) + 1) + len(header)
    offsets = first + np.cumsum([0, *map(len, samples)])
    path.write_bytes(
        np.uint32(len(samples)).tobytes()
        + offsets.astype("<u4").tobytes()
        + header
        + b"".join(samples)
    )
    return path


WRITERS = {".jsonl": write_jsonl, ".parquet": write_parquet, ".mds": write_mds, ".npz": write_npz}


def packed_settings(old: Path, new: Path, **fields: Any) -> PrepareSettings:
    fields = {"validation_fraction": 0.0, **fields}
    return PrepareSettings(tokenizer=str(new), packed_tokenizer=str(old), **fields)


@pytest.mark.parametrize("suffix", WRITERS)
def test_packed_documents_come_back_one_by_one(
    suffix: str, old: Path, new: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(old)
    groups = [DOCUMENTS] if suffix == ".npz" else [DOCUMENTS[:3], DOCUMENTS[3:]]
    source = tmp_path / "shards"
    source.mkdir()
    WRITERS[suffix](source / f"a{suffix}", [pack(tokenizer, group) for group in groups])
    (source / "index.json").write_text("{}")
    prepared = prepare([source], tmp_path / "out", packed_settings(old, new, shard_tokens=40))
    assert texts_of(tmp_path / "out") == DOCUMENTS
    assert prepared.manifest.counts["no_records"] == 1
    assert prepared.manifest.tokenizer_sha256 == Tokenizer.load(new).sha256
    assert len(prepared.manifest.splits["train"]) > 1, "units that begin inside a record"


def test_the_number_of_processes_changes_nothing(old: Path, new: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(old)
    source = write_mds(tmp_path / "a.mds", [pack(tokenizer, DOCUMENTS)] * 3)
    for workers in (1, 2):
        rules = packed_settings(old, new, shard_tokens=60, validation_fraction=0.3)
        prepare([source], tmp_path / str(workers), rules, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_a_cut_document_loses_only_half_a_character(old: Path, new: Path, tmp_path: Path) -> None:
    record = pack(Tokenizer.load(old), ["whole", "🙂"], whole=False)
    source = write_jsonl(tmp_path / "a.jsonl", [record, pack(Tokenizer.load(old), ["after"])])
    prepared = prepare([source], tmp_path / "out", packed_settings(old, new))
    assert texts_of(tmp_path / "out") == ["whole", "after"]
    assert prepared.manifest.counts["empty"] == 1


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=6), st.integers(0, 24), st.integers(0, 24))
def test_whole_characters_are_the_valid_middle(text: str, start: int, end: int) -> None:
    data = text.encode()[start:end]
    assert _whole_characters(data).decode() == data.decode("utf-8", "ignore")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"indices": [[0, 10**6]]}, "invalid_records"),
        ({"indices": [[3, 1]]}, "invalid_records"),
        ({"indices": [[0, 1], [2]]}, "invalid_records"),
        ({"indices": [0, 1]}, "invalid_records"),
        ({"indices": [[-1, 1]]}, "invalid_records"),
        ({"input_ids": ["a", "b"]}, "invalid_records"),
        ({"input_ids": [1, 10**6], "indices": [[0, 2]]}, "unknown_ids"),
        ({"indices": None}, "missing_text"),
        ({"indices": []}, "documents"),
    ],
)
def test_records_that_do_not_fit_are_counted_out(
    change: dict[str, Any], reason: str, old: Path, new: Path, tmp_path: Path
) -> None:
    good = pack(Tokenizer.load(old), ["good"])
    source = write_jsonl(tmp_path / "a.jsonl", [{**good, **change}, good])
    prepared = prepare([source], tmp_path / "out", packed_settings(old, new))
    assert texts_of(tmp_path / "out") == ["good"]
    assert prepared.manifest.counts[reason] == 1


def test_a_damaged_shard_is_named(old: Path, new: Path, tmp_path: Path) -> None:
    whole = write_mds(tmp_path / "a.mds", [pack(Tokenizer.load(old), DOCUMENTS)])
    data = whole.read_bytes()
    for size in range(0, len(data), 7):
        with pytest.raises(DamagedError):
            list(read_mds(data[:size], 0))
    whole.write_bytes(data[:-1])
    with pytest.raises(DataError, match=r"a\.mds: not a complete MDS shard"):
        prepare([whole], tmp_path / "out", packed_settings(old, new))


def test_another_tokenizer_for_the_ids_is_another_set(old: Path, new: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [pack(Tokenizer.load(old), ["text"])])
    prepare([source], tmp_path / "out", packed_settings(old, new))
    again = prepare([source], tmp_path / "out", packed_settings(old, new))
    assert again.outcome == "unchanged"
    with pytest.raises(DataError, match="packed_tokenizer was"):
        prepare([source], tmp_path / "out", packed_settings(new, new))


def domain(name: str, text: str) -> dict[str, Any]:
    return {"text": text, "meta": {"redpajama_set_name": name}}


RECORDS = [
    domain("RedPajamaBook", "a book"),
    domain("RedPajamaGithub", "code"),
    {"text": "no meta"},
    {"text": "odd meta", "meta": "RedPajamaBook"},
    domain("RedPajamaBook", "another book"),
]


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".parquet"])
def test_one_domain_of_a_mixed_file(suffix: str, new: Path, tmp_path: Path) -> None:
    path = tmp_path / f"chunk{suffix}"
    records = RECORDS
    if suffix == ".parquet":
        records = [one for one in RECORDS if isinstance(one.get("meta", {}), dict)]
        write_parquet(path, records)
    else:
        zstandard = pytest.importorskip("zstandard")
        lines = "".join(json.dumps(record) + "\n" for record in records)
        path.write_bytes(zstandard.compress(lines.encode()))
    only = ("meta.redpajama_set_name=RedPajamaBook",)
    rules = PrepareSettings(tokenizer=str(new), only=only, validation_fraction=0.0)
    prepared = prepare([path], tmp_path / "books", rules)
    assert texts_of(tmp_path / "books") == ["a book", "another book"]
    assert prepared.manifest.counts["not_selected"] == len(records) - 2
    rules = PrepareSettings(tokenizer=str(new), only=("meta.x=y",), validation_fraction=0.0)
    with pytest.raises(DataError, match="not_selected"):
        prepare([path], tmp_path / "none", rules)


@pytest.mark.parametrize("shard_tokens", [None, 30])
def test_everything_can_be_held_out(shard_tokens: int | None, new: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [domain("x", text) for text in DOCUMENTS])
    rules = PrepareSettings(tokenizer=str(new), validation_fraction=1.0, shard_tokens=shard_tokens)
    prepared = prepare([source], tmp_path / "out", rules)
    assert texts_of(tmp_path / "out", "validation") == DOCUMENTS
    assert prepared.manifest.total("train", "tokens") == 0
    if shard_tokens:
        assert 1 < len(prepared.manifest.splits["validation"]) < len(DOCUMENTS)
    with pytest.raises(DataError, match="has no train documents"):
        TokenDataset.open(tmp_path / "out", "train")


def test_choices_that_cannot_be(new: Path) -> None:
    with pytest.raises(ConfigError, match="leaves no text to train a tokenizer"):
        PrepareSettings(vocab_size=300, validation_fraction=1.0)
    with pytest.raises(ConfigError, match="FIELD=VALUE"):
        PrepareSettings(tokenizer=str(new), only=("=x",))


def test_settings_of_earlier_sets_have_not_changed() -> None:
    """A finished set is recognised by these; new choices appear only when they are made."""
    assert not {"only", "packed_tokenizer"} & set(PrepareSettings(vocab_size=300).record())
