from __future__ import annotations

import io
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from sambay.cli import prepare as command
from sambay.cli.main import main


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.py").write_text(f"value_{number} = {number}\n" * (number + 3))
    return folder


def call(*arguments: object) -> int:
    return main(["prepare", *map(str, arguments)])


def test_a_run_says_what_it_made_and_what_it_left_out(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (texts / "empty.py").touch()
    (texts / "binary.py").write_bytes(b"\0")
    (texts / "copy.py").write_bytes((texts / "00.py").read_bytes())
    (texts / "repaired.py").write_bytes(b"x" * 300 + b"\xff")
    (texts / "broken.py").symlink_to(texts / "nowhere")
    (texts / "tests").mkdir()
    (texts / "tests" / "out.py").write_text("left out")
    arguments = [texts, "--out", tmp_path / "data", "--vocab-size", 9000, "--exclude", "tests"]
    arguments += ["--validation-fraction", 0.2]
    assert call(*arguments) == 0
    shown = capsys.readouterr()
    for part in (
        "prepared in",
        "42 documents of 42 files",
        "train:",
        "bytes per token",
        "<|endoftext|> (id 0)",
        "no more than that of 9,000",
        "1 empty texts, 1 binary texts (NUL bytes), 1 unreadable files",
        "1 files or folders excluded",
        "1 undecodable bytes in 1 texts became U+FFFD",
        "1 exact copies",
        "broken.py: No such file",
    ):
        assert part in shown.out, part
    assert "prepare: tokenizing" in shown.err
    assert call(*arguments) == 0
    assert "already finished, nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{texts}/nothing", "--vocab-size", "300"], "nothing: No such file"),
        (["{texts}", "--vocab-size", "12"], "at least 257"),
        (["{texts}", "--tokenizer", "{texts}"], "has no tokenizer.json"),
        (["{texts}", "--vocab-size", "300", "--include", "*.md"], "--include"),
        (["{texts}", "--vocab-size", "300", "--validation-fraction", "2"], "from 0 to 1"),
        (["{texts}", "--vocab-size", "300", "--workers", "0"], "--workers"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    out = tmp_path / "data"
    assert call(*(part.format(texts=texts) for part in arguments), "--out", out) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("error: ")
    assert message in errors[-1]
    assert not out.exists()


def test_separators_are_written_with_escapes(texts: Path, tmp_path: Path) -> None:
    source = tmp_path / "stories.txt"
    source.write_text("\n--\n".join(f"story number {n}" for n in range(30)))
    arguments = ["--vocab-size", 300, "--validation-fraction", 0.3]
    out = tmp_path / "data"
    assert call(source, "--out", out, *arguments, "--document-separator", r"\n--\n") == 0
    from sambay.data.manifest import Manifest

    assert Manifest.read(out).counts["documents"] == 30


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_exits_with_2_and_leaves_whole_files(
    texts: Path, tmp_path: Path, workers: int
) -> None:
    # A limit on the size of files makes the kernel refuse in the middle of a write.
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    (texts / "large.py").write_text("".join(f"x{n} = {n * n}\n" for n in range(9000)))
    out = tmp_path / "data"
    arguments = [texts, "--out", out, "--vocab-size", 300, "--validation-fraction", 0.2]
    arguments += ["--shard-tokens", 600, "--workers", workers]
    code = "import sys; from sambay.cli.main import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "prepare", *map(str, arguments)],
        preexec_fn=limit,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "error: cannot write " in done.stderr.splitlines()[-1]
    left = [path for path in out.rglob("*") if path.is_file()]
    assert not [path for path in left if path.name.startswith(".")]
    assert call(*arguments) == 0
    assert not (out / ".prepare").exists()


def test_importing_the_command_is_cheap() -> None:
    code = (
        "import argparse, sys; from sambay.cli import prepare;"
        "prepare.add_arguments(argparse.ArgumentParser());"
        "print([name for name in ('torch', 'numpy', 'tokenizers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminals_get_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = _Terminal()
    progress = command.show_progress(stream)
    progress.begin("tokenizing", 4_000_000)
    progress.advance(4_000_000)
    progress.end()
    progress.begin("training the tokenizer", None)
    progress.end()
    assert "4.00M/4.00M" in stream.getvalue()
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert type(command.show_progress(stream)).__name__ == "_Lines"


def test_logs_get_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(command.time, "monotonic", lambda: now)
    stream = io.StringIO()
    progress = command.show_progress(stream)
    progress.begin("tokenizing", 9_000_000_000)
    for _ in range(60):
        now += 1
        progress.advance(1_000_000)
    progress.end()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 13
    assert lines[-1] == ("prepare: tokenizing: 1%, 60.0 MB of 9,000.0 MB, 1.00 MB/s, 2h29m left")
