"""A run that is killed at any moment continues, and ends with the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sambay.data.prepare import prepare
from sambay.data.settings import PrepareSettings
from sambay.data.shards import TokenDataset
from sambay.errors import DataError
from tests.data.corpus import contents, make, write_texts

# Forks before the tokenizer library starts its threads: one process per kill, without the imports.
_KILLER = """
import os, shutil, signal, sys
import numpy
from pathlib import Path
from sambay.data.prepare import prepare
from sambay.data.settings import PrepareSettings

source, tokenizer, root, old = sys.argv[1:5]
settings = PrepareSettings(tokenizer=tokenizer, validation_fraction=0.2, shard_tokens=4000)
NAMES = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir")


def run(out, force, die_at):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    count = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call

    for name in NAMES:
        setattr(os, name, counted(getattr(os, name)))
    try:
        prepare([source], out, settings, workers=1, force=force)
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(3)
    os._exit(0)


for force in (False, True):
    die_at = 1
    while True:
        out = Path(root) / f"{'replace' if force else 'fresh'}-{die_at:03d}"
        if force:
            shutil.copytree(old, out)
        status = run(out, force, die_at)
        if not os.WIFSIGNALED(status):
            assert status == 0, status
            shutil.rmtree(out)
            break
        complete = (out / "manifest.json").exists()
        print(out.name, "manifest" if complete else "none", flush=True)
        again = run(out, force, -1)
        assert again == 0, again
        die_at += STRIDE
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("resume"), 25, seed=1)


def test_a_kill_before_any_change_of_the_disk_is_survived(
    source: Path, prepared: Path, tmp_path: Path
) -> None:
    fields = {"tokenizer": str(prepared), "shard_tokens": 4000}
    make(source, tmp_path / "expected", **fields)
    expected = contents(tmp_path / "expected")
    old = tmp_path / "old"
    make(source, old, vocab_size=270)
    outs = tmp_path / "outs"
    outs.mkdir()
    script = _KILLER.replace("STRIDE", "9")
    command = [sys.executable, "-c", script, str(source), str(prepared), str(outs), str(old)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    states = [line.split() for line in done.stdout.splitlines()]
    assert len(states) > 6
    # Both kinds of moments were met: with the old or new set complete, and with none.
    assert {state for _, state in states} == {"manifest", "none"}
    for name, _ in states:
        assert contents(outs / name) == expected, name


def _start(source: Path, out: Path) -> subprocess.Popen[bytes]:
    arguments = [str(source), "--out", str(out), "--vocab-size", "300", "--workers", "2"]
    arguments += ["--shard-tokens", "8000", "--validation-fraction", "0.2"]
    # Held up before its end, so that it is killed before that however slow this process is.
    code = (
        "import sys, time; import sambay.data.prepare as prepare\n"
        "prepare._manifest = lambda *arguments: time.sleep(600)\n"
        "from sambay.cli.main import main; sys.exit(main())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, "prepare", *arguments], stderr=subprocess.DEVNULL
    )


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_kill_9_of_the_command_loses_at_most_the_shards_in_work(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "source", 280, seed=2)
    out = tmp_path / "out"
    units = out / ".prepare" / "units"
    kept: dict[str, int] = {}
    for wanted in (1, 5):
        process = _start(source, out)
        while len(list(units.glob("0*.json"))) < wanted:
            assert process.poll() is None, "finished before it could be killed"
            time.sleep(0.002)
        children = _children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / "manifest.json").exists()
        deadline = time.monotonic() + 100
        while any(_runs(child) for child in children):
            assert time.monotonic() < deadline, "workers outlived the command"
            time.sleep(0.01)
        for path in units.glob("0*.json"):
            # What an earlier run had completed was not written again.
            written = path.stat().st_mtime_ns
            assert kept.setdefault(path.name, written) == written
    assert len(kept) >= 5
    settings = PrepareSettings(vocab_size=300, validation_fraction=0.2, shard_tokens=8000)
    resumed = prepare([source], out, settings, workers=1)
    assert resumed.outcome == "resumed"
    prepare([source], tmp_path / "expected", settings, workers=1)
    assert contents(out) == contents(tmp_path / "expected")


class _StopError(Exception):
    """Ends a run between two shards."""


class _StopAfter:
    def __init__(self, bytes_done: int) -> None:
        self._left = bytes_done

    def begin(self, stage: str, total: int | None) -> None:
        self._counting = stage == "tokenizing"

    def advance(self, count: int) -> None:
        if self._counting:
            self._left -= count
            if self._left < 0:
                raise _StopError

    def end(self) -> None:
        pass


@pytest.fixture
def unfinished(source: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A source and a folder with unfinished work on it."""
    own, out = tmp_path / "own", tmp_path / "out"
    shutil.copytree(source, own)
    with pytest.raises(_StopError):
        make(own, out, progress=_StopAfter(9000))
    assert len(list((out / ".prepare" / "units").iterdir())) >= 2
    with pytest.raises(DataError, match="not finished"):
        TokenDataset.open(out, "train")
    return own, out


def test_changed_sources_are_refused_when_resuming(unfinished: tuple[Path, Path]) -> None:
    source, out = unfinished
    before = contents(out)
    victim = source / "003.txt"
    original, times = victim.read_bytes(), victim.stat()
    victim.write_bytes(original + b"more")
    with pytest.raises(DataError, match=r"003\.txt has changed.*--force"):
        make(source, out)
    victim.unlink()
    with pytest.raises(DataError, match=r"003\.txt is gone"):
        make(source, out)
    victim.write_bytes(original)
    os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))
    (source / "zzz.txt").write_text("new")
    with pytest.raises(DataError, match=r"zzz\.txt is new"):
        make(source, out)
    (source / "zzz.txt").unlink()
    assert contents(out) == before
    assert make(source, out).outcome == "resumed"


def test_changed_settings_are_refused_when_resuming(
    unfinished: tuple[Path, Path], tmp_path: Path
) -> None:
    source, out = unfinished
    with pytest.raises(DataError, match=r"vocab_size was 300, now 301.*--force"):
        make(source, out, vocab_size=301)
    assert make(source, out, vocab_size=301, force=True).outcome == "written"
    make(source, tmp_path / "fresh", vocab_size=301)
    assert contents(out) == contents(tmp_path / "fresh")


def test_force_continues_work_that_fits(unfinished: tuple[Path, Path]) -> None:
    assert make(*unfinished, force=True).outcome == "resumed"


def test_a_shard_cut_short_behind_our_back_is_written_again(
    unfinished: tuple[Path, Path], tmp_path: Path
) -> None:
    source, out = unfinished
    shard = out / ".prepare" / "train" / "00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    make(source, out)
    make(source, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


def test_what_a_kill_while_writing_the_manifest_leaves_is_removed(
    unfinished: tuple[Path, Path],
) -> None:
    source, out = unfinished
    (out / ".manifest.json.x1y2").write_text("half")
    (out / ".prepare" / "train" / ".00007.bin.x1y2").write_text("half")
    make(source, out)
    assert not [name for name in contents(out) if Path(name).name.startswith(".")]


def test_a_text_that_changes_unseen_is_noticed(unfinished: tuple[Path, Path]) -> None:
    source, out = unfinished
    for path in source.rglob("*.txt"):
        times = path.stat()
        path.write_bytes(path.read_bytes()[::-1].replace(b"\n", b"x"))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(DataError, match="changed while it was being prepared"):
        make(source, out)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"format": 99}', b'{"format": 1}'])
def test_an_unreadable_record_of_work_is_explained(
    unfinished: tuple[Path, Path], content: bytes
) -> None:
    source, out = unfinished
    (out / ".prepare" / "plan.json").write_bytes(content)
    with pytest.raises(DataError, match=r"plan\.json.*--force"):
        make(source, out)
    assert make(source, out, force=True).outcome == "written"


def test_a_changed_tokenizer_is_noticed(unfinished: tuple[Path, Path], prepared: Path) -> None:
    source, out = unfinished
    path = out / ".prepare" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"][0]["lstrip"] = True
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="has been changed"):
        make(source, out)


def test_two_commands_do_not_write_to_one_folder(unfinished: tuple[Path, Path]) -> None:
    import fcntl

    source, out = unfinished
    with (out / ".prepare" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another sambay prepare is writing"):
            make(source, out)
    assert make(source, out).outcome == "resumed"
