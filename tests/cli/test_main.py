"""The command's frame: help without torch, exit codes, one-line errors."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import types

import pytest

import sambay
from sambay.cli import main as cli
from sambay.errors import ConfigError

TORCHLESS = """
import sys
from sambay.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
assert "torch" not in sys.modules, "torch was imported"
sys.exit(code)
"""


@pytest.mark.parametrize("words", [[], ["--help"], *([name, "--help"] for name in cli.COMMANDS)])
def test_help_needs_no_torch(words: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", TORCHLESS, *words], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "usage: sambay" in result.stdout
    if not words or words == ["--help"]:
        for name in cli.COMMANDS:
            assert name in result.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.strip() == f"sambay {sambay.__version__}"


@pytest.mark.parametrize(
    ("word", "hint"), [("trian", "did you mean 'train'"), ("xyzzy", "known: bench")]
)
def test_unknown_commands(word: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([word]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: unknown command '{word}'")
    assert hint in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_unknown_options_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--frobnicate"])
    assert end.value.code == 2


def _install(monkeypatch: pytest.MonkeyPatch, error: BaseException | None, code: object) -> None:
    def run(args: argparse.Namespace) -> object:
        if error is not None:
            raise error
        return code

    module = types.SimpleNamespace(__doc__="x", add_arguments=lambda parser: None, run=run)
    monkeypatch.setattr(importlib, "import_module", lambda name: module)


@pytest.mark.parametrize(
    ("error", "returned", "code", "text"),
    [
        (None, None, 0, ""),
        (None, 0, 0, ""),
        (None, 143, 143, ""),
        (
            ConfigError("model.window = 0; set it to 1"),
            None,
            2,
            "error: model.window = 0; set it to 1\n",
        ),
        (KeyboardInterrupt(), None, 130, "interrupted\n"),
    ],
)
def test_exit_codes(
    error: BaseException | None,
    returned: object,
    code: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _install(monkeypatch, error, returned)
    assert cli.main(["train"]) == code
    assert capsys.readouterr().err == text


def test_our_own_mistakes_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, TypeError("a bug"), None)
    with pytest.raises(TypeError):
        cli.main(["train"])


def test_a_reader_that_goes_away_ends_quietly() -> None:
    script = (
        "import sys, types, importlib\n"
        "import sambay.cli.main as cli\n"
        "def run(args):\n    [print('x' * 1000) for _ in range(1000)]\n"
        "module = types.SimpleNamespace(__doc__='', add_arguments=lambda p: None, run=run)\n"
        "importlib.import_module = lambda name: module\n"
        "sys.exit(cli.main(['train']))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
