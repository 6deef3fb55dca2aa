from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from sambay.data.manifest import Manifest
from sambay.data.shards import TokenDataset
from sambay.data.tokenizer import Tokenizer
from sambay.errors import DataError


@pytest.fixture
def own(prepared: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(prepared, tmp_path / "data"))


@pytest.fixture(scope="module")
def dataset(prepared: Path) -> TokenDataset:
    return TokenDataset.open(prepared, "train")


def whole(folder: Path, split: str) -> np.ndarray:
    files = sorted((folder / split).glob("*.bin"))
    assert len(files) > 2
    return np.concatenate([np.fromfile(file, "<u2") for file in files])


def test_reading_crosses_shards(prepared: Path, dataset: TokenDataset) -> None:
    tokens = whole(prepared, "train")
    assert dataset.num_tokens == len(tokens)
    assert dataset.read(0, len(tokens)).tolist() == tokens.tolist()
    borders = np.cumsum([shard.tokens for shard in dataset.manifest.splits["train"]])
    for border in borders[:-1].tolist():
        for start, count in ((border - 3, 7), (border, 1), (border - 1, 1), (border, 0)):
            assert dataset.read(start, count).tolist() == tokens[start : start + count].tolist()
    assert dataset.read(len(tokens), 0).size == 0
    for start, count in ((-1, 2), (len(tokens) - 1, 2), (0, -1)):
        with pytest.raises(DataError, match="not in the train split"):
            dataset.read(start, count)


def test_documents_are_the_texts_each_ended_once(prepared: Path, texts: Path) -> None:
    expected = {path.read_bytes().decode() for path in texts.rglob("*.txt")}
    found = []
    for split in ("train", "validation"):
        dataset = TokenDataset.open(prepared, split)
        position = 0
        for number in range(dataset.num_documents):
            tokens = dataset.document(number)
            assert (tokens == dataset.eos_id).nonzero()[0].tolist() == [len(tokens) - 1]
            assert tokens.tolist() == dataset.read(position, len(tokens)).tolist()
            position += len(tokens)
            found.append(dataset.tokenizer.decode(tokens.tolist()))
        assert position == dataset.num_tokens
        with pytest.raises(DataError, match="document"):
            dataset.document(dataset.num_documents)
    assert len(found) == len(expected) == 60
    assert set(found) == expected


def test_bytes_are_exact_for_every_range(dataset: TokenDataset) -> None:
    assert dataset.count_bytes(0, dataset.num_tokens) == dataset.text_bytes
    assert len(dataset.text(0, dataset.num_tokens)) == dataset.text_bytes
    joined = b""
    for start in range(0, dataset.num_tokens, 97):
        count = min(97, dataset.num_tokens - start)
        part = dataset.text(start, count)
        assert dataset.count_bytes(start, count) == len(part)
        joined += part
    # The ranges end inside characters here and there, and nothing is lost.
    assert joined == dataset.text(0, dataset.num_tokens)
    joined.decode()


def test_a_pickled_dataset_opens_the_folder_again(dataset: TokenDataset) -> None:
    dataset.read(0, 5)
    data = pickle.dumps(dataset)
    assert len(data) < 1000
    assert pickle.loads(data).read(3, 9).tolist() == dataset.read(3, 9).tolist()


def test_the_fingerprint_is_of_the_content(dataset: TokenDataset, own: Path) -> None:
    assert TokenDataset.open(own, "train").manifest_hash == dataset.manifest_hash
    path = own / "manifest.json"
    path.write_text(path.read_text().replace('"eos_id": 0', '"eos_id": 1'))
    assert TokenDataset.open(own, "train").manifest_hash != dataset.manifest_hash


@pytest.mark.parametrize("file", ["train/00001.bin", "train/00000.idx"])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_is_named_at_opening(own: Path, file: str, change: int) -> None:
    data = (own / file).read_bytes()
    (own / file).write_bytes(data[:change] if change < 0 else data + b"x")
    with pytest.raises(DataError, match=rf"{file} is damaged: {len(data) + change} bytes"):
        TokenDataset.open(own, "train")
    TokenDataset.open(own, "validation").verify()


@pytest.mark.parametrize("file", ["train/00001.bin", "train/00002.idx"])
def test_a_flipped_byte_is_found_by_its_checksum(own: Path, file: str) -> None:
    data = bytearray((own / file).read_bytes())
    data[len(data) // 2] ^= 1
    (own / file).write_bytes(data)
    with pytest.raises(DataError, match=rf"{file} is damaged: its checksum differs"):
        TokenDataset.open(own, "train").verify()


def test_a_missing_file_is_named(own: Path) -> None:
    dataset = TokenDataset.open(own, "train")
    (own / "train/00001.bin").unlink()
    with pytest.raises(DataError, match=r"00001\.bin: No such file"):
        TokenDataset.open(own, "train")
    with pytest.raises(DataError, match=r"00001\.bin: No such file"):
        dataset.read(0, dataset.num_tokens)
    with pytest.raises(DataError, match=r"00001\.bin: No such file"):
        dataset.verify()


def test_no_manifest_means_not_finished(own: Path) -> None:
    (own / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"has no manifest\.json: not prepared, or not finished"):
        TokenDataset.open(own, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("format"), "not the manifest"),
        (lambda m: m.update(format_version=99), "version 99"),
        (lambda m: m.pop("eos_id"), "'eos_id' is missing"),
        (lambda m: m.update(dtype="int8"), "int8"),
        (lambda m: m["splits"].pop("train"), "train"),
        (lambda m: m["splits"]["train"]["shards"][0].pop("tokens"), "tokens"),
        (lambda m: m["splits"].update(train=7), "damaged"),
    ],
)
def test_a_damaged_manifest_is_explained(own: Path, change, message: str) -> None:
    path = own / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        TokenDataset.open(own, "train")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]"])
def test_a_manifest_that_is_no_json_is_explained(own: Path, content: bytes) -> None:
    (own / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json is"):
        TokenDataset.open(own, "train")


def test_the_manifest_survives_a_round_trip(prepared: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(prepared)
    manifest.write(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == (prepared / "manifest.json").read_bytes()
    assert manifest.byte_level


def test_another_tokenizer_is_refused(own: Path) -> None:
    other = Tokenizer.train(["something else entirely"], 280)
    dataset = TokenDataset.open(own, "train")
    with pytest.raises(DataError, match="checkpoint is not the tokenizer"):
        dataset.check_tokenizer(other, "checkpoint")
    other.save(own)
    with pytest.raises(DataError, match=r"tokenizer\.json is not the tokenizer"):
        TokenDataset.open(own, "train").tokenizer  # noqa: B018


def test_unknown_splits_suggest_the_nearest(own: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'validation'"):
        TokenDataset.open(own, "validatoin")
