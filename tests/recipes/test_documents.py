"""Every training command in the documents means something, and its output there is what it says."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from sambay.cli import train
from sambay.cli.main import main
from sambay.cli.recipe_words import configured
from sambay.recipes.catalogue import RECIPES

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPTIONS_WITH_VALUE = {"--run-dir", "--devices", "--flops"}


def training_words(text: str) -> list[list[str]]:
    """What follows `sambay train` or `-m sambay.train` in the code blocks of a document."""
    found = []
    for block in re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.search(r"(?:^sambay train|-m sambay\.train) ([^'#]*)", line)
            if match:
                found.append(shlex.split(match[1]))
    return found


def split(words: list[str]) -> tuple[str, list[str]]:
    """The recipe, and its arguments and overrides; options are left out."""
    plain = []
    iterator = iter(words)
    for word in iterator:
        if word in OPTIONS_WITH_VALUE:
            next(iterator)
        elif not word.startswith("--"):
            plain.append(word)
    return plain[0], plain[1:]


SHOWN = [
    words
    for document in DOCUMENTS
    for words in training_words(document.read_text())
    if split(words)[0] in RECIPES and not any(".json" in word for word in words)
]


TABLES = re.findall(
    r"^```sh\nsambay train ([^\n]+)\n```\n\n```text\n(.*?)^```",
    (ROOT / "docs" / "cluster.md").read_text(),
    flags=re.DOTALL | re.MULTILINE,
)


def test_the_cluster_page_was_read() -> None:
    recipes = {split(words)[0] for words in SHOWN}
    assert {"ladder", "phi4_mini_flash", "prolong_32k", "demo_sambay"} <= recipes
    assert len(TABLES) == 5


@pytest.mark.parametrize("words", SHOWN, ids=" ".join)
def test_words_are_accepted(words: list[str]) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    train.add_arguments(parser)
    parser.parse_intermixed_args(words)
    recipe, changes = split(words)
    name, config = configured(recipe, changes)
    assert name.startswith(recipe)
    assert config.num_steps >= 1


@pytest.mark.parametrize(("words", "shown"), TABLES)
def test_tables_are_what_a_dry_run_prints(
    words: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["train", *shlex.split(words), "data.directory=nowhere"])
    assert shown in capsys.readouterr().out
