"""The same input gives the same bytes, and what is unusable is an error that leaves nothing."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from sambay.data.manifest import Manifest
from sambay.data.prepare import prepare
from sambay.data.settings import PrepareSettings
from sambay.data.shards import TokenDataset
from sambay.data.tokenizer import END_OF_TEXT
from sambay.errors import ConfigError, DataError
from sambay.files import WriteFailed
from tests.data.corpus import contents, make, write_texts


def test_processes_listing_order_and_place_do_not_matter(
    texts: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(prepared)
    assert len([name for name in expected if name.startswith("train/")]) >= 6
    make(texts, tmp_path / "two", workers=2)
    assert contents(tmp_path / "two") == expected
    copy = tmp_path / "moved" / texts.name
    names = [path.relative_to(texts) for path in texts.rglob("*.txt")]
    random.Random(0).shuffle(names)
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(texts / name, copy / name)
    make(copy, tmp_path / "shuffled")
    assert contents(tmp_path / "shuffled") == expected


def test_nothing_but_the_set_is_left(prepared: Path) -> None:
    assert sorted(path.name for path in prepared.iterdir()) == [
        "manifest.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "train",
        "validation",
    ]
    for split in ("train", "validation"):
        TokenDataset.open(prepared, split).verify()


def test_the_split_depends_on_content_only(texts: Path, prepared: Path, tmp_path: Path) -> None:
    def held_out(folder: Path) -> set[str]:
        dataset = TokenDataset.open(folder, "validation")
        decode = dataset.tokenizer.decode
        return {decode(dataset.document(n).tolist()) for n in range(dataset.num_documents)}

    lines = [json.dumps({"text": path.read_bytes().decode()}) for path in texts.rglob("*.txt")]
    random.Random(3).shuffle(lines)
    source = tmp_path / "all.jsonl.gz"
    # Every text twice, in another order and another format: copies stay on one side.
    source.write_bytes(gzip.compress("\n".join(lines * 2).encode()))
    result = make(source, tmp_path / "out")
    assert result.manifest.counts["duplicate_documents"] == 60
    assert held_out(tmp_path / "out") == held_out(prepared)


def test_all_kinds_of_sources_in_one_set(tmp_path: Path, texts: Path) -> None:
    root = tmp_path / "mixed"
    write_texts(root, 9, seed=5)
    (root / "code.py").write_text("def f(x):\n    return x\n")
    (root / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (root / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}\n'))
    table = pyarrow.table({"text": ["four", "five"]})
    pyarrow.parquet.write_table(table, root / "c.parquet")
    (root / "empty.txt").touch()
    (root / "image.png").write_bytes(b"\x89PNG\0\0\0")
    (root / "latin.txt").write_bytes("déjà vu ".encode("latin-1"))
    (root / "broken.jsonl.gz").write_bytes(b"no gzip")
    result = make(root, tmp_path / "out", validation_fraction=0.3, workers=2)
    counts = result.manifest.counts
    assert counts["documents"] == 15
    assert (counts["empty"], counts["binary"], counts["undecodable"]) == (1, 1, 1)
    assert counts["unreadable_files"] == 1
    assert "broken.jsonl.gz" in result.unreadable[0]


def test_long_texts_with_shared_offsets_are_spread_over_shards(tmp_path: Path) -> None:
    source = tmp_path / "long.jsonl"
    long = "".join(f"line {n} of a long record\n" for n in range(3000))
    source.write_text(json.dumps({"text": long}) + '\n{"text": "short"}\n')
    result = make(source, tmp_path / "out", max_document_bytes=500, shard_tokens=700)
    manifest = result.manifest
    assert len(manifest.splits["train"]) > 10
    assert manifest.counts["cut"] == 1
    sizes = [manifest.total(split, "bytes") for split in ("train", "validation")]
    assert sum(sizes) == len(long) + len("short")


def test_shards_have_about_the_size_asked_for(texts: Path, tmp_path: Path) -> None:
    shards = make(texts, tmp_path / "out", shard_tokens=5000).manifest.splits["train"]
    assert all(2500 < shard.tokens < 7500 for shard in shards[:-1])


@pytest.mark.parametrize(("last", "dtype"), [(65_535, "uint16"), (65_536, "uint32")])
def test_the_largest_token_id_decides_how_tokens_are_stored(
    texts: Path, prepared: Path, tmp_path: Path, last: int, dtype: str
) -> None:
    content = json.loads((prepared / "tokenizer.json").read_text())
    content["model"]["vocab"]["one-more"] = last
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    manifest = make(texts, tmp_path / "out", tokenizer=str(path)).manifest
    assert (manifest.vocab_size, manifest.dtype) == (last + 1, dtype)
    dataset = TokenDataset.open(tmp_path / "out", "train")
    narrow = TokenDataset.open(prepared, "train")
    assert dataset.read(0, dataset.num_tokens).tolist() == (
        narrow.read(0, narrow.num_tokens).tolist()
    )
    assert dataset.count_bytes(0, dataset.num_tokens) == dataset.text_bytes


def test_a_given_tokenizer_gives_the_tokens_of_a_trained_one(
    texts: Path, prepared: Path, tmp_path: Path
) -> None:
    make(texts, tmp_path / "out", tokenizer=str(prepared / "tokenizer.json"))
    first, second = contents(prepared), contents(tmp_path / "out")
    del first["manifest.json"], second["manifest.json"]
    assert first == second


def test_validation_texts_do_not_train_the_tokenizer(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghij", k=9)) for _ in range(20)]
    for word in words:
        (source / word).write_text(f"{word} " * 30)
    make(source, tmp_path / "out", validation_fraction=0.3, vocab_size=600)
    held_out = TokenDataset.open(tmp_path / "out", "validation")
    vocabulary = json.loads(held_out.tokenizer.definition)["model"]["vocab"]
    text = held_out.text(0, held_out.num_tokens).decode()
    assert held_out.num_documents > 2
    for word in words:
        assert (f"Ġ{word}" in vocabulary) == (word not in text)


def test_texts_that_spell_the_end_token_do_not_end_documents(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(9):
        (source / f"{number}.txt").write_text(f"{number} {END_OF_TEXT} inside {END_OF_TEXT}")
    make(source, tmp_path / "out", validation_fraction=0.4)
    dataset = TokenDataset.open(tmp_path / "out", "train")
    tokens = dataset.read(0, dataset.num_tokens)
    assert (tokens == dataset.eos_id).sum() == dataset.num_documents
    assert dataset.text(0, dataset.num_tokens).count(END_OF_TEXT.encode()) == (
        2 * dataset.num_documents
    )


def test_repeating_a_finished_command_changes_nothing(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert make(texts, out).outcome == "written"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert make(texts, out).outcome == "unchanged"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_finished_set_is_replaced_only_by_force(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(texts, out)
    before = contents(out)
    with pytest.raises(DataError, match=r"vocab_size was 300, now 310.*--force"):
        make(texts, out, vocab_size=310)
    with pytest.raises(DataError, match="sources have changed"):
        make(texts / "deep", out)
    with pytest.raises(DataError, match="vocab_size was 300, now None"):
        make(texts, out, tokenizer=str(out))
    assert contents(out) == before
    make(texts, out, vocab_size=310, validation_fraction=0.0, force=True)
    after = contents(out)
    assert not [name for name in after if name.startswith((".", "validation"))]
    make(texts, tmp_path / "fresh", vocab_size=310, validation_fraction=0.0)
    assert after == contents(tmp_path / "fresh")
    with pytest.raises(DataError, match="no validation documents"):
        TokenDataset.open(out, "validation")


@pytest.mark.parametrize("name", ["train", "validation", "tokenizer.json"])
def test_files_of_others_are_not_mixed_in(texts: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=f"holds {name}, which sambay prepare did not write"):
        make(texts, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_other_files_in_the_output_folder_stay(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    make(texts, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    Manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda root: (root / "a.txt").touch(), r"nothing usable \(1 empty\)"),
        (lambda root: (root / "a.txt").write_bytes(b"\0" * 50), r"1 binary"),
        (lambda root: (root / "a.txt").write_bytes(b"\xe9" * 50), r"1 undecodable"),
        (
            lambda root: (root / "a.jsonl").write_text('{"content": "x", "id": 1}'),
            r"no text in field 'text'; choose one of 'content', 'id' with --text-field",
        ),
        (lambda root: (root / "a.jsonl").write_text("not json\n"), r"1 invalid_records"),
        (lambda root: (root / "a.jsonl.gz").write_bytes(b"x"), r"unreadable, such as .*a\.jsonl"),
        (
            lambda root: pyarrow.parquet.write_table(
                pyarrow.table({"body": ["x"]}), root / "a.parquet"
            ),
            r"choose one of 'body' with --text-field",
        ),
    ],
)
def test_a_source_with_nothing_usable_is_an_error(
    texts: Path, tmp_path: Path, write, message: str
) -> None:
    root = tmp_path / "bad"
    root.mkdir()
    write(root)
    with pytest.raises(DataError, match=message):
        prepare([texts, root], tmp_path / "out", PrepareSettings(vocab_size=300))
    assert not (tmp_path / "out").exists()


def test_an_empty_split_names_the_fraction_that_helps(texts: Path, tmp_path: Path) -> None:
    source = next(texts.rglob("*.txt"))
    with pytest.raises(DataError, match="no document of 1 falls into the validation") as caught:
        make(source, tmp_path / "out", validation_fraction=1e-9)
    words = str(caught.value).split()
    fraction = float(words[words.index("--validation-fraction") + 1])
    with pytest.raises(DataError, match="all 1 documents fall into the validation split"):
        make(source, tmp_path / "out", validation_fraction=fraction)
    assert not (tmp_path / "out").exists()
    assert make(source, tmp_path / "out", validation_fraction=0.0).outcome == "written"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "one of --vocab-size"),
        ({"vocab_size": 300, "tokenizer": "x"}, "one of --vocab-size"),
        ({"vocab_size": 256}, "at least 257"),
        ({"vocab_size": 300, "eos_token": "x"}, "--eos-token belongs to --tokenizer"),
        ({"vocab_size": 300, "validation_fraction": 1.1}, "from 0 to 1"),
        ({"vocab_size": 300, "validation_fraction": float("nan")}, "from 0 to 1"),
        ({"vocab_size": 300, "shard_tokens": 0}, "--shard-tokens"),
        ({"vocab_size": 300, "include": ("\udce9*",)}, "not valid UTF-8"),
        ({"vocab_size": 300, "document_separator": "\udce9"}, "not valid UTF-8"),
        ({"vocab_size": 300, "max_document_bytes": 10}, "--max-document-bytes"),
    ],
)
def test_impossible_settings_are_explained(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PrepareSettings(**fields)


def test_impossible_calls_are_explained(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--workers"):
        make(texts, tmp_path / "out", workers=0)
    with pytest.raises(ConfigError, match="no SOURCE"):
        prepare([], tmp_path / "out", PrepareSettings(vocab_size=300))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="not a folder"):
        make(texts, tmp_path / "file")
    with pytest.raises(DataError, match=r"tokenizer .*nowhere"):
        make(texts, tmp_path / "out", tokenizer=str(tmp_path / "nowhere"))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_no_half_written_file_and_the_next_run_continues(
    texts: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "made" / "out"
    fsync = os.fsync
    for allowed in (0, 2, 3, 8, 10):
        calls = 0

        def full(descriptor: int, allowed: int = allowed) -> None:
            nonlocal calls
            calls += 1
            if calls > allowed:
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(WriteFailed, match="disk is full"):
            make(texts, out, workers=1)
        names = contents(out) if out.exists() else {}
        assert not [name for name in names if Path(name).name.startswith(".")]
        if allowed < 3:
            assert not out.parent.exists()
    monkeypatch.setattr(os, "fsync", fsync)
    assert make(texts, out).outcome == "resumed"
    assert contents(out) == contents(prepared)


def test_a_folder_that_cannot_be_created_is_an_error(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteFailed, match="cannot write into"):
        make(texts, tmp_path / "file" / "out")
    assert (tmp_path / "file").read_bytes() == b""


def test_exotic_file_names_are_kept_apart(tmp_path: Path) -> None:
    source = tmp_path / "with space"
    source.mkdir()
    for name in (b"new\nline.txt", b"latin\xe9.txt", "日本.txt".encode()):
        Path(os.fsdecode(bytes(source) + b"/" + name)).write_bytes(b"text of " + name[:3])
    result = make(source, tmp_path / "out dir", validation_fraction=0.0)
    assert result.manifest.counts["documents"] == 3
