"""Safetensors files: equal to the library's reading and writing, and every kind of damage named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sambay.errors import CheckpointMismatch, ConfigError
from sambay.model import weights, weights_writer
from sambay.model.weights import open_file, open_folder
from sambay.model.weights_writer import (
    TensorPlan,
    parse_size,
    plan_tensor,
    write_file,
    write_folder,
)

INDEX = "model.safetensors.index.json"


def random_tensors() -> dict[str, torch.Tensor]:
    """Every dtype, with odd sizes, a scalar and an empty tensor."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for index, dtype in enumerate(weights.DTYPES.values()):
        bits = torch.randint(0, 2, (5, index + 1, 3), generator=generator)
        tensors[f"t{index}"] = (bits * (3 if dtype is not torch.bool else 1)).to(dtype)
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.zeros(0, 4)
    return tensors


def plans(tensors: dict[str, torch.Tensor]) -> list[TensorPlan]:
    return [plan_tensor(name, tensor) for name, tensor in tensors.items()]


@pytest.mark.parametrize("piece", [1, 7, 64, 8 << 20])
def test_what_we_write_the_library_reads(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_writer, "_PIECE_BYTES", piece)
    tensors, told = random_tensors(), []
    write_file(tmp_path / "a.safetensors", plans(tensors), told.append)
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    assert sum(told) == sum(tensor.nbytes for tensor in tensors.values())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers asks for it


@pytest.mark.parametrize("piece", [1, 7, 64, 8 << 20])
def test_what_the_library_writes_we_read(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_PIECE_BYTES", piece)
    tensors = random_tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    stored = open_folder(tmp_path)
    assert stored.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        assert torch.equal(stored.read(name), tensor)
        wide = torch.empty(tensor.shape, dtype=torch.float64)
        stored.fill(name, wide)
        assert torch.equal(wide, tensor.double())


def test_parts_of_tensors_and_tensors_of_parts(tmp_path: Path) -> None:
    x = torch.arange(20.0).reshape(5, 4)
    plan = TensorPlan("x", torch.bfloat16, (5, 4), lambda: (x[:2], x[2:].t().t().double()))
    write_file(tmp_path / "x.safetensors", [plan])
    stored = open_file(tmp_path / "x.safetensors")
    assert torch.equal(stored.read("x"), x.bfloat16())
    rows = torch.empty(3, 4)
    stored.fill("x", rows, first=8)
    assert torch.equal(rows, x[2:])
    with pytest.raises(AssertionError):
        stored.fill("x", rows, first=9)


def test_a_plan_that_does_not_fill_its_shape_is_our_bug(tmp_path: Path) -> None:
    plan = TensorPlan("x", torch.float32, (5, 4), lambda: (torch.zeros(5, 3),))
    with pytest.raises(AssertionError, match="x do not fill"):
        write_file(tmp_path / "x.safetensors", [plan])


def test_every_tensor_is_aligned_to_its_element(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(3, dtype=torch.uint8),
        "b": torch.zeros(5, dtype=torch.bfloat16),
        "c": torch.zeros(7),
        "d": torch.zeros(1, dtype=torch.float64),
    }
    write_file(tmp_path / "x.safetensors", plans(tensors))
    for stored in open_file(tmp_path / "x.safetensors").tensors.values():
        assert stored.offset % stored.dtype.itemsize == 0


def test_shards_and_their_index(tmp_path: Path) -> None:
    tensors = {f"t{index}": torch.full((index,), float(index)) for index in range(1, 9)}
    write_folder(tmp_path, plans(tensors), max_shard_bytes=40)
    names = sorted(path.name for path in tmp_path.iterdir())
    # 4 + 8 + 12 + 16 bytes fill the first shard exactly, each later one does not leave room.
    assert names == [f"model-{n:05d}-of-00005.safetensors" for n in range(1, 6)] + [INDEX]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 4 * 36}
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])
    stored = open_folder(tmp_path)
    assert all(torch.equal(stored.read(name), value) for name, value in tensors.items())


def _pointer(size: int) -> str:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize {size}\n"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("nothing there", "model has no weights: neither model.safetensors nor model.safe"),
        ("pickled", r"has only pickled weights \('pytorch_model-1.bin', 'x.pth'\).*sambay convert"),
        ("no index", r"has 'model-00001-of-00003.safetensors', .* neither .*; fetch the missing"),
        ("shard missing", "names file 'model-00002-of-00003.safetensors' that is not there"),
        ("shards missing", "names 2 files 'model-00002.*', 'model-00003.*' that are not there"),
        ("cut", r"model-00002-of-00003.safetensors is incomplete: 5 of its \d+ bytes are missing"),
        ("cut in header", "model-00002.* has only 30 bytes, its header is incomplete"),
        ("empty file", "model-00002.* has only 0 bytes"),
        ("too long", "model-00002.* is damaged: 9 bytes follow its last tensor"),
        ("pointer", "model-00002.* is a Git LFS pointer, not the data; run `git lfs pull`"),
        ("web page", "model-00002.* is a web page"),
        ("text", "model-00002.* is no safetensors file"),
        ("header text", "model-00002.* is damaged or no safetensors file"),
        ("hole", r"model-00002.* is damaged .*tensor 'b' is out of place"),
        ("unknown dtype", "tensor 'b' has dtype F8_E5M2; known are F64"),
        ("renamed in shard", "promises tensor 'b' in model-00002.*, which has no such tensor"),
        ("in two shards", "model-00003.* repeats tensor 'b' of model-00002"),
        ("index list", "index.json is no index of safetensors shards"),
        ("index elsewhere", "names the file '../secret'; shards must lie beside"),
    ],
)
def test_damage_is_named_in_one_line(damage: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    if damage == "pickled":
        (folder / "pytorch_model-1.bin").write_bytes(b"x")
        (folder / "x.pth").write_bytes(b"x")
    if damage not in ("nothing there", "pickled"):
        write_folder(folder, plans({name: torch.zeros(4) for name in "abc"}), max_shard_bytes=16)
    shard = folder / "model-00002-of-00003.safetensors"
    data = shard.read_bytes() if shard.exists() else b""
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    index = folder / INDEX
    replaced = {
        "cut": data[:-5],
        "cut in header": data[:30],
        "empty file": b"",
        "too long": data + b"x" * 9,
        "pointer": _pointer(12).encode(),
        "web page": b"<!DOCTYPE html><html></html>",
        "text": b"these are no tensors at all",
        "header text": (5).to_bytes(8, "little") + b"hello",
        "hole": data.replace(b"[0,16]", b"[4,20]") + b"1234",
        "unknown dtype": _with_header(data, header.replace(b'"F32"', b'"F8_E5M2"')),
        "renamed in shard": data.replace(b'"b"', b'"x"'),
    }
    if damage in replaced:
        assert replaced[damage] != data
        shard.write_bytes(replaced[damage])
    if damage in ("shard missing", "shards missing"):
        shard.unlink()
    if damage == "shards missing":
        (folder / "model-00003-of-00003.safetensors").unlink()
    if damage == "no index":
        index.unlink()
    if damage == "in two shards":
        both = {"b": torch.zeros(4), "c": torch.zeros(4)}
        save_file(both, folder / "model-00003-of-00003.safetensors")
    if damage == "index list":
        index.write_text("[]")
    if damage == "index elsewhere":
        index.write_text('{"weight_map": {"a": "../secret"}}')
    with pytest.raises(CheckpointMismatch, match=message) as caught:
        open_folder(folder)
    assert "\n" not in str(caught.value)


def _with_header(data: bytes, header: bytes) -> bytes:
    old = int.from_bytes(data[:8], "little")
    return len(header).to_bytes(8, "little") + header + data[8 + old :]


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(100)}, tmp_path / "model.safetensors")
    stored = open_folder(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(200)
    with pytest.raises(CheckpointMismatch, match="became shorter"):
        stored.read("a")


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("2KiB", 2048), (77, 77), ("12", 12)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 apples", "0", "-3GB", "0.1"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size of 1 byte or more"):
        parse_size(text)
