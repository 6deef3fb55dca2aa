from __future__ import annotations

import os
from pathlib import Path

import pytest

from sambay.data.sources import Listing, classify, list_files, matches
from sambay.errors import DataError


def listing(*sources: Path, include=(), exclude=(), out: Path | None = None) -> Listing:
    out = out or sources[0].parent / "elsewhere"
    return list_files(list(sources), include=include, exclude=exclude, out=out)


def names(found: Listing) -> list[str]:
    return [Path(file.path).name for file in found.files]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name in ("b.py", "a.txt", "sub/c.py", "sub/test/d.py", ".git/e.py", "__pycache__/f.py"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return root


def test_a_folder_gives_its_visible_files_sorted_by_path(tree: Path) -> None:
    found = listing(tree)
    assert names(found) == ["a.txt", "b.py", "c.py", "d.py"]
    assert found.skipped["hidden"] == 2


def test_the_order_of_the_file_system_and_of_the_sources_does_not_matter(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("x")
    expected = listing(tree, other, out=tmp_path / "out").files
    walk = os.walk

    def backwards(*args, **kwargs):
        for folder, folders, files in walk(*args, **kwargs):
            folders.sort(reverse=True)
            yield folder, folders, sorted(files, reverse=True)

    monkeypatch.setattr(os, "walk", backwards)
    assert listing(other, tree, out=tmp_path / "out").files == expected


def test_patterns_see_names_paths_and_parents(tree: Path) -> None:
    assert names(listing(tree, include=["*.py"])) == ["b.py", "c.py", "d.py"]
    assert names(listing(tree, include=["*.py"], exclude=["test"])) == ["b.py", "c.py"]
    assert names(listing(tree, include=["sub/*"], exclude=["sub/test"])) == ["c.py"]
    assert names(listing(tree, include=["sub"])) == ["c.py", "d.py"]
    assert not matches("subway/x.py", ["sub"])


def test_a_file_given_by_name_ignores_patterns_and_hiding(tree: Path) -> None:
    assert names(listing(tree / ".git/e.py", include=["*.txt"])) == ["e.py"]


def test_overlapping_sources_and_links_give_a_file_once(tree: Path) -> None:
    (tree / "z_link.py").symlink_to(tree / "b.py")
    found = listing(tree, tree / "sub", tree / "a.txt")
    assert names(found) == ["a.txt", "b.py", "c.py", "d.py"]
    assert found.skipped["repeated_files"] == 4


def test_links_to_folders_are_counted_and_broken_links_reported(tree: Path) -> None:
    (tree / "around").symlink_to(tree)
    (tree / "broken.txt").symlink_to(tree / "nowhere")
    found = listing(tree)
    assert found.skipped["folder_links"] == 1
    assert len(found.unreadable) == 1
    assert "broken.txt" in found.unreadable[0]


def test_pipes_in_folders_are_passed_over(tree: Path) -> None:
    os.mkfifo(tree / "pipe")
    assert listing(tree).skipped["special_files"] == 1


def test_the_output_folder_is_no_source(tree: Path) -> None:
    out = tree / "data"
    out.mkdir()
    (out / "00000.bin").write_bytes(b"x")
    assert names(listing(tree, out=out)) == ["a.txt", "b.py", "c.py", "d.py"]
    with pytest.raises(DataError, match="output folder"):
        listing(out, out=out)
    with pytest.raises(DataError, match="output folder"):
        listing(tree, out=tree)


def test_a_missing_source_is_named(tree: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.txt: No such file"):
        listing(tree, tree / "nothing.txt")


def test_an_empty_folder_and_patterns_without_match_are_errors(tmp_path: Path, tree: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="holds no file"):
        listing(empty)
    with pytest.raises(DataError, match="--include"):
        listing(tree, include=["*.rst"])
    (empty / "broken").symlink_to(empty / "nowhere")
    with pytest.raises(DataError, match="no readable file"):
        listing(empty)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.txt", ("text", "")),
        ("noext", ("text", "")),
        ("a.JSONL", ("jsonl", "")),
        ("a.jsonl.gz", ("jsonl", "gzip")),
        ("a.ndjson.zst", ("jsonl", "zstd")),
        ("c4.json.gz", ("jsonl", "gzip")),
        ("package.json", ("text", "")),
        ("a.txt.gz", ("text", "gzip")),
        ("x.parquet", ("parquet", "")),
        (".gz", ("text", "")),
    ],
)
def test_the_name_tells_kind_and_compression(name: str, expected: tuple[str, str]) -> None:
    assert classify(name) == expected
