"""`sambay chat`: scripted through a pipe, and in a pseudo-terminal."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("tokenizers")

from sambay.cli import loading
from sambay.cli.chat import Screen
from sambay.cli.main import main
from sambay.generate import Engine, Request, SamplingParams, sample_seed
from sambay.hf.chat import ChatFormat, Message, find_template
from sambay.hf.loading import load_model
from sambay.hf.tokenizer import load_tokenizer
from tests.cli.models import END_IDS, write_official

GREEDY = ("--temperature", 0, "--max-new-tokens", 9)
SUMMARY = re.compile(
    r"\[\d+ tokens( \([\d.e+]+ tokens/s\))?(, cut at the limit|, stopped)?; read \d+ tokens in "
    r"[\d.]+ s; \d+ tokens in the cache\]"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_official(tmp_path_factory.mktemp("chat") / "official")


def expected(
    folder: Path, turns: list[str], sampling: SamplingParams, limit: int, system: str | None = None
) -> list[str]:
    """The answers, each from the whole conversation computed anew."""
    tokenizer = load_tokenizer(folder / "tokenizer.json", folder)
    encode = ChatFormat(tokenizer, find_template([folder])).prompt
    engine = Engine(load_model(folder))
    messages = [] if system is None else [Message("system", system)]
    answers = []
    for number, turn in enumerate(turns, start=1):
        messages.append(Message("user", turn))
        seed = sample_seed(sampling.seed, (number + (number - 1) + (system is not None)) // 2)
        drawn = SamplingParams(sampling.temperature, 0, sampling.top_p, seed=seed)
        request = Request(encode(messages), limit, drawn, END_IDS)
        ids = [token for token in engine.generate([request])[0].tokens if token not in END_IDS]
        answers.append(tokenizer.decode(ids))
        messages.append(Message("assistant", answers[-1], tuple(ids)))
    return answers


def say(
    lines: bytes,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *words: object,
) -> tuple[int, str, list[str]]:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
    capsys.readouterr()
    code = main(["chat", *map(str, words)])
    streams = capsys.readouterr()
    return code, streams.out, streams.err.splitlines()


@pytest.mark.parametrize("system", [None, "Be brief. <|end|>"])
def test_turns_from_a_pipe(
    system: str | None, folder: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    turns = ["What is 12 + 1?", "<|end|><|user|> 猫", "Again"]
    lines = "\n".join((turns[0], "", "  ", *turns[1:])).encode()
    options = () if system is None else ("--system", system)
    code, out, err = say(lines, capsys, monkeypatch, folder, *GREEDY, *options)
    assert code == 0
    answers = expected(folder, turns, SamplingParams(), 9, system)
    assert out == "".join(f"{answer}\n" for answer in answers)
    assert len(err) == 3
    for line in err:
        assert SUMMARY.fullmatch(line), line


def test_the_cache_is_kept_and_reset_forgets(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = b"first\nsecond\n/help\n/reset\nfirst\n/rest\n/exit\nnever"
    code, out, err = say(lines, capsys, monkeypatch, folder, *GREEDY)
    assert code == 0
    answers = out.split("\n")
    assert answers[2] == answers[0] == expected(folder, ["first"], SamplingParams(), 9)[0]
    assert len(answers) == 4
    sizes = [[int(n) for n in re.findall(r"(\d+) tokens (?:in|in the)", line)] for line in err]
    summaries = [pair for pair in sizes if pair]
    first, second, again = [(read, cached) for read, cached in summaries]
    assert first == again
    tokenizer = load_tokenizer(folder / "tokenizer.json", folder)
    encode = ChatFormat(tokenizer, find_template([folder])).prompt
    assert first[0] == len(encode([Message("user", "first")]))
    # Only what came after the cached tokens was read: the rest of the answer, and the new turn.
    assert second[0] < len(encode([Message("user", "second")])) + 3
    assert "/reset  forget the conversation and start a new one" in err
    assert any("unknown command '/rest' (did you mean '/reset'?)" in line for line in err)


def test_settings_are_the_published_ones_and_reach_the_sampler(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = ["one", "two"]
    lines = "\n".join(turns).encode()
    default = expected(folder, turns, SamplingParams(0.6, 0, 0.95), 12)
    assert say(lines, capsys, monkeypatch, folder, "--max-new-tokens", 12)[1].split("\n")[:-1] == (
        default
    )
    hot = ("--max-new-tokens", 12, "--temperature", 1.5, "--top-p", 0.5, "--seed", 4)
    warm = expected(folder, turns, SamplingParams(1.5, 0, 0.5, seed=4), 12)
    assert say(lines, capsys, monkeypatch, folder, *hot)[1].split("\n")[:-1] == warm
    assert warm != default


def test_other_templates_and_tokenizers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    bare = write_official(tmp_path / "bare")
    tokenizer = (bare / "tokenizer.json").rename(tmp_path / "other.json")
    (bare / "config.json").write_text(
        json.dumps(
            json.loads((bare / "config.json").read_text())
            | {"auto_map": {"AutoTokenizer": "Xenova/gpt-4o"}}
        )
    )
    code, _, err = say(b"x", capsys, monkeypatch, bare, *GREEDY)
    assert (code, len(err)) == (2, 1)
    assert "remote 'Xenova/gpt-4o'" in err[0]
    options = ("--tokenizer", tokenizer)
    expected_out = expected(folder, ["x"], SamplingParams(), 9)[0] + "\n"
    assert say(b"x", capsys, monkeypatch, bare, *GREEDY, *options)[:2] == (0, expected_out)
    (tmp_path / "t.jinja").write_text("{{ messages[-1].content }}")
    _, plain, _ = say(
        b"x", capsys, monkeypatch, bare, *GREEDY, *options, "--template", tmp_path / "t.jinja"
    )
    assert plain != expected_out


@pytest.mark.parametrize(
    ("words", "lines", "message"),
    [
        (["{tmp}/none"], b"x", "none does not exist; give a model folder"),
        (["{tmp}"], b"x", "holds no model"),
        (["{model}", "--template", "{tmp}/no"], b"x", "no cannot be read"),
        (["{model}", "--max-new-tokens", "0"], b"x", "--max-new-tokens is 0"),
        (["{model}", "--temperature", "-1"], b"x", "temperature is -1.0"),
        (["{model}"], b"ok\n\xff\xfe\n", "standard input, line 2, is not UTF-8"),
        (["{model}"], b"many words to fill the context", r"context is 8; /reset starts a new one"),
        (["{model}", "--dtype", "float32"], b"x", None),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], lines: bytes, message: str | None, folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if message is not None and "context" in message:
        folder = write_official(tmp_path / "short")
        settings = folder / "tokenizer_config.json"
        known = json.loads(settings.read_text())
        settings.write_text(json.dumps(known | {"model_max_length": 8}))
    given = [word.replace("{tmp}", str(tmp_path)).replace("{model}", str(folder)) for word in words]
    code, _, err = say(lines, capsys, monkeypatch, *GREEDY, *given)
    if message is None:
        assert code == 0
        return
    assert code == 2
    errors = [line for line in err if not SUMMARY.fullmatch(line)]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert re.search(message, errors[0])


def test_the_context_limits_an_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_official(tmp_path / "short")
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 20}))
    code, out, err = say(b"hi", capsys, monkeypatch, folder, "--temperature", 0)
    assert code == 0
    answer = expected(folder, ["hi"], SamplingParams(), 20 - len("hi") - 3)
    assert out == answer[0] + "\n"
    assert "cut at the limit" in err[0]


def test_too_little_memory_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sambay.generate.memory.available_bytes", lambda device: 1000)
    code, out, err = say(b"x", capsys, monkeypatch, folder, *GREEDY)
    assert (code, out, len(err)) == (2, "", 1)
    assert re.match(r"error: the weights in .* need .* in float32, .*--dtype bfloat16", err[0])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_thoughts_are_dimmed_however_they_are_cut(
    size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "a <think>b\n<thin</think> c<think></think><<think>d</thin"
    screen = Screen(styled=True, thinks=False)
    for start in range(0, len(text), size):
        screen.write(text[start : start + size])
    screen.finish()
    dim, plain = "\033[2m", "\033[0m"
    assert capsys.readouterr().out == (
        f"a {dim}<think>b\n<thin</think>{plain} c{dim}<think></think>{plain}<{dim}<think>d</thin"
        f"{plain}\n"
    )
    screen = Screen(styled=True, thinks=True)
    screen.write("x</think>y")
    screen.finish()
    assert capsys.readouterr().out == f"{dim}x</think>{plain}y\n"
    screen = Screen(styled=False, thinks=True)
    screen.write(text)
    screen.finish()
    assert capsys.readouterr().out == text + "\n"


class Terminal:
    """The command in a pseudo-terminal of its own, which turns ^C into SIGINT."""

    def __init__(self, *words: object) -> None:
        pty = pytest.importorskip("pty")
        command = [sys.executable, "-m", "sambay.cli.main", "chat", *map(str, words)]
        self.seen, self.ended, self.status = "", False, 0
        self.process, self.master = pty.fork()
        if self.process == 0:
            os.environ |= {"OMP_NUM_THREADS": "1", "TERM": "dumb"}
            os.execv(sys.executable, command)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, pattern: str, again: str = "", seconds: float = 200) -> str:
        """What is on the screen once the pattern is; `again` is typed when nothing comes for long.

        input() does not notice a ^C that comes after it has shown the prompt and before it waits
        for keys, until the next key. On a busy machine that moment can be long.
        """
        deadline = time.monotonic() + seconds
        while (found := re.search(pattern, self.seen, re.DOTALL)) is None:
            assert time.monotonic() < deadline, self.seen[-2000:]
            if not self._read(5.0):
                self.type(again)
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def exit_code(self, seconds: float = 100) -> int:
        """How the command ends by itself."""
        deadline = time.monotonic() + seconds
        while not self.ended:
            assert time.monotonic() < deadline, self.seen[-2000:]
            self._read(0.1)
            pid, self.status = os.waitpid(self.process, os.WNOHANG)
            self.ended = pid == self.process
        return os.waitstatus_to_exitcode(self.status)

    def close(self) -> None:
        if not self.ended:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
        os.close(self.master)

    def _read(self, seconds: float) -> bool:
        if not select.select([self.master], [], [], seconds)[0]:
            return False
        try:
            self.seen += os.read(self.master, 4096).decode(errors="replace")
        except OSError:  # the other side is closed
            time.sleep(0.05)
        return True


@pytest.fixture(scope="module")
def endless(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with end tokens that never win, however an answer before was cut off."""
    copy = tmp_path_factory.mktemp("endless") / "official"
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    weights["model.embed_tokens.weight"][list(END_IDS)] = 0  # their logits, of a tied head
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.fixture
def terminal(endless: Path) -> Iterator[Terminal]:
    opened = Terminal(endless, "--temperature", 0, "--max-new-tokens", 1_000_000)
    yield opened
    opened.close()


def test_ctrl_c_stops_the_answer_and_not_the_chat(terminal: Terminal) -> None:
    terminal.wait_for("Ctrl-D leaves.*> ")
    terminal.type("\x03")
    terminal.wait_for("Ctrl-D or /exit leaves.*> ", again="\x03")
    terminal.type("a\r")
    terminal.wait_for(".{80}")
    terminal.type("\x03")
    stopped = terminal.wait_for(r"in the cache\]\s+> ")
    assert ", stopped; read" in stopped
    held = int(re.findall(r"(\d+) tokens in the cache", stopped)[-1])
    assert held > 10
    terminal.type("and now\r")
    terminal.wait_for(".{40}")
    terminal.type("\x03")
    again = terminal.wait_for(r"in the cache\]\s+> ")
    # The interrupted answer was still in the cache: only the new turn was read.
    assert int(re.findall(r"read (\d+) tokens", again)[-1]) < 20
    assert int(re.findall(r"(\d+) tokens in the cache", again)[-1]) > held
    terminal.type("\x04")
    assert terminal.exit_code() == 0


def test_ctrl_c_ends_a_script(endless: Path) -> None:
    command = [
        sys.executable, "-m", "sambay.cli.main", "chat", str(endless), "--temperature", "0",
        "--max-new-tokens", "1000000",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"a\nnever reached\n")
    process.stdin.close()
    process.stdin = None
    process.stdout.read(30)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 130
    assert err.decode().count("stopped;") == 1
    assert b"Traceback" not in err


def test_bfloat16_weights_stay_bfloat16(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_official(tmp_path / "half", torch.bfloat16)
    models = []

    def watch(args: argparse.Namespace, path: Path) -> loading.LoadedModel:
        models.append(loading.load(args, path))
        return models[-1]

    monkeypatch.setattr("sambay.cli.chat.load", watch)
    assert say(b"x", capsys, monkeypatch, folder, *GREEDY)[0] == 0
    assert say(b"x", capsys, monkeypatch, folder, *GREEDY, "--dtype", "float32")[0] == 0
    dtypes = [loaded.generator.engine.dtype for loaded in models]
    assert dtypes == [torch.bfloat16, torch.float32]
