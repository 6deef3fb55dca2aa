"""What the documents promise exists: commands, make targets, files, links, and running examples."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.models import write_official

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    # A backslash at the end of a line continues it.
    lines = "\n".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def sambay_commands(text: str) -> list[list[str]]:
    return [words for words in commands(text) if words and words[0] == "sambay"]


SHOWN = [words for document in DOCUMENTS for words in sambay_commands(document.read_text())]


def test_readme_is_short() -> None:
    assert len(README.splitlines()) < 200


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_exist(document: Path) -> None:
    named = {words[1] for words in commands(document.read_text()) if words[:1] == ["make"]}
    named |= set(re.findall(r"`make ([a-z-]+)", document.read_text()))
    assert named <= set(re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
        if not target.startswith("https://"):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_the_map_lists_folders_that_exist() -> None:
    named = re.findall(r"^((?:src|tests|docs|benchmarks)\S*/) ", README, flags=re.MULTILINE)
    assert len(named) > 8
    for folder in named:
        assert any((ROOT / folder).iterdir()), folder


def test_every_subcommand_is_shown_and_answers_help() -> None:
    shown = {words[1] for words in sambay_commands(README)}
    assert {"prepare", "train", "generate", "doctor"} <= shown
    for name in shown:
        result = subprocess.run(
            [sys.executable, "-m", "sambay.cli.main", name, "--help"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert "usage:" in result.stdout


@pytest.mark.parametrize("words", SHOWN, ids=" ".join)
def test_options_shown_are_accepted(words: list[str]) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    command, rest = importlib.import_module(f"sambay.cli.{words[1]}"), words[2:]
    if hasattr(command, "SUBCOMMANDS"):
        assert rest[0] in command.SUBCOMMANDS
        module = rest[0].replace("-", "_")
        command, rest = importlib.import_module(f"{command.__name__}.{module}"), rest[1:]
    command.add_arguments(parser)
    parser.parse_intermixed_args(rest)


# Nothing has to be prepared for these, or a small checkpoint of the same layout can stand in.
WHOLE = ("README.md", "architecture.md", "phi4-mini-flash.md")


def test_python_examples_run(tmp_path: Path) -> None:
    """Each with names of its own, in one process, since importing takes longer than running."""
    write_official(tmp_path / "Phi-4-mini-flash-reasoning")
    program = ""
    for name in WHOLE:
        (document,) = [path for path in DOCUMENTS if path.name == name]
        examples = blocks(document.read_text(), "python")
        assert examples, name
        for number, example in enumerate(examples, start=1):
            example = example.replace("max_new_tokens=4096", "max_new_tokens=4")
            where = f"{name}, example {number}"
            program += f"exec(compile({example!r}, {where!r}, 'exec'), {{}})\n"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_python_examples_import_what_exists() -> None:
    examples = [example for path in DOCUMENTS for example in blocks(path.read_text(), "python")]
    assert len(examples) > len(WHOLE)
    for example in examples:
        for node in ast.parse(example).body:
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name), ast.unparse(node)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
