"""`sambay generate`, in the process and as a command."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tokenizers")

from sambay.cli.main import main
from sambay.data.tokenizer import Tokenizer
from sambay.generate import Engine, Request, SamplingParams, TextGenerator
from sambay.hf.loading import load_model
from sambay.hf.quantisation import quantise
from sambay.model.folder import load_model_folder, save_model_folder
from tests import tiny
from tests.cli.models import END_IDS, write_official
from tests.hf import gpt4o

PROMPT = "def naïve(猫):"


@pytest.fixture(autouse=True)
def _one_thread(_deterministic_start: None) -> None:
    """Thousands of tiny steps: handing each to a second thread costs more than it saves."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer.train(["def f(x): return x\n" * 3], 258)
    folder = tmp_path_factory.mktemp("a model") / "it is"
    tokenizer.save(folder.parent)
    model = tiny.tiny_model("sambay", dtype=torch.float32, vocab_size=tokenizer.vocab_size)
    save_model_folder(folder, model, folder.parent / "tokenizer.json")
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["generate", *map(str, arguments)])
    streams = capsys.readouterr()
    return code, streams.out, streams.err


def expected(folder: Path, count: int = 1, **settings: object) -> list[str]:
    generator = TextGenerator(Engine(load_model_folder(folder)), Tokenizer.load(folder))
    sampling = SamplingParams(**({"temperature": 0.8, "top_p": 0.95} | settings))  # pyright: ignore
    results = generator.generate([PROMPT], max_new_tokens=30, sampling=sampling, num_samples=count)
    return [result.text for result in results]


@pytest.mark.parametrize("how", ["argument", "file", "stdin", "dash"])
def test_the_prompt_comes_from_anywhere(
    how: str, model_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes())))
    source = {
        "argument": ["--prompt", PROMPT],
        "file": ["--prompt-file", file],
        "stdin": [],
        "dash": ["--prompt-file", "-"],
    }[how]
    code, out, err = run(
        capsys, "--model", model_folder, *source, "--max-new-tokens", 30, "--seed", 7
    )
    assert code == 0
    assert out == expected(model_folder, seed=7)[0] + "\n"
    num_tokens = len(Tokenizer.load(model_folder).encode(PROMPT))
    assert re.fullmatch(
        rf"prefill {num_tokens} tokens in [\d.]+ s \(.* tokens/s\), decode \d+ tokens in .*\n", err
    )


def test_all_settings_reach_the_engine(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 3}
    options = [part for k, v in settings.items() for part in ("--" + k.replace("_", "-"), v)]
    fixed = ("--model", model_folder, "--prompt", PROMPT, "--max-new-tokens", 30, "--no-stream")
    whole = expected(model_folder, **settings)[0]
    assert run(capsys, *fixed, *options, "--threads", 1)[1] == whole + "\n"
    stop = whole[5:7]
    stopped = run(capsys, *fixed, *options, "--stop", "\0never", "--stop", stop)[1]
    assert stopped == whole[: whole.index(stop)] + "\n"
    code, out, _ = run(capsys, *fixed, *options, "--dtype", "bfloat16", "--device", "cpu")
    assert code == 0
    assert len(out) > 1


def test_samples_are_printed_in_order(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ("--model", model_folder, "--prompt", PROMPT, "--max-new-tokens", 30)
    _, out, _ = run(capsys, *fixed, "--num-samples", 3)
    samples = expected(model_folder, count=3)
    assert len(set(samples)) == 3
    assert out == "".join(
        f"--- sample {i} of 3 ---\n{text}\n" for i, text in enumerate(samples, start=1)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the prompt is empty; give some text with --prompt"),
        (["--prompt-file", "{tmp}/empty"], "the prompt is empty"),
        (["--prompt-file", "{tmp}/none"], "--prompt-file .*none: No such file"),
        (["--prompt-file", "{tmp}"], "--prompt-file .*: Is a directory"),
        (["--prompt-file", "{tmp}/latin"], r"--prompt-file .* is not UTF-8 text \(byte 3\)"),
        (["--model", "{tmp}/none"], "--model .*none does not exist; give a model folder"),
        (["--model", "{tmp}"], "holds no model"),
        (["--temperature", "-1"], r"temperature is -1.0; .* from 0 \(greedy\)"),
        (["--top-p", "nan"], "top_p is nan; it must be"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0; it must be at least 1"),
        (["--max-new-tokens", "9" * 15], "memory on cpu, .* lower max_new_tokens"),
        (["--num-samples", "-2"], "--num-samples is -2"),
        (["--num-samples", "2", "--temperature", "0"], "would write one text 2 times"),
        (["--threads", "0"], "--threads is 0"),
        (["--stop", ""], "--stop is empty"),
        (["--device", "abacus"], "--device abacus is not a device"),
        (["--device", "cuda:99"], "--device cuda:99: torch finds . CUDA devices"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, model_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "latin").write_bytes("abcé".encode("latin-1"))
    given = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    if not given[0].startswith("--prompt"):
        given += ["--prompt", "x"]
    if "--model" not in given:
        given += ["--model", str(model_folder)]
    code, out, err = run(capsys, *given)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert re.search(message, err)


def test_a_tokenizer_of_another_model_is_refused(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.tiny_model("sambay", dtype=torch.float32, vocab_size=99)
    save_model_folder(tmp_path / "small", model, model_folder / "tokenizer.json")
    code, _, err = run(capsys, "--model", tmp_path / "small", "--prompt", "x")
    assert code == 2
    assert "use the tokenizer that belongs to the model" in err


@pytest.fixture(scope="module")
def official_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_official(tmp_path_factory.mktemp("generate") / "official")


def test_an_official_folder_answers_a_chat(
    official_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ids that the model sees are those of the template, and its end tokens end the text."""
    fixed = ("--model", official_folder, "--prompt", PROMPT, "--temperature", 0)
    limit = ("--max-new-tokens", 12)
    tokenizer = Tokenizer.load(official_folder)
    engine = Engine(load_model(official_folder))
    controls = gpt4o.CONTROLS
    start, end, answer = (controls[name] for name in ("<|user|>", "<|end|>", "<|assistant|>"))

    def greedy(ids: list[int]) -> str:
        tokens = engine.generate([Request(ids, 12, stop_token_ids=END_IDS)])[0].tokens
        return tokenizer.decode(token for token in tokens if token not in END_IDS) + "\n"

    turn = [start, *tokenizer.encode(PROMPT), end, answer]
    chatted = greedy(turn)
    assert run(capsys, *fixed, *limit, "--chat")[:2] == (0, chatted)
    assert run(capsys, *fixed, *limit, "--chat", "--no-stream")[:2] == (0, chatted)
    assert run(capsys, *fixed, *limit)[:2] == (0, greedy(tokenizer.encode(PROMPT)))
    system = [controls["<|system|>"], *tokenizer.encode("Be brief"), end]
    briefly = run(capsys, *fixed, *limit, "--chat", "--system", "Be brief")[1]
    assert briefly == greedy(system + turn)
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}<|tag|>")
    tagged = run(capsys, *fixed, *limit, "--chat", "--template", tmp_path / "t.jinja")[1]
    assert tagged == greedy([*turn[1:-2], controls["<|tag|>"]])
    assert len({chatted, briefly, tagged}) == 3


def test_end_tokens_come_from_the_folder(
    official_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(official_folder, folder)
    fixed = ("--model", folder, "--prompt", "x", "--temperature", 0, "--max-new-tokens", 12)
    tokens = Engine(load_model(folder)).generate([Request(Tokenizer.load(folder).encode("x"), 12)])
    ids = tokens[0].tokens
    last = next(i for i in range(2, 12) if ids[i] not in ids[:i])  # a token new at its place
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [639, ids[last]]}))
    code, out, err = run(capsys, *fixed)
    assert (code, out) == (0, Tokenizer.load(folder).decode(ids[:last]) + "\n")
    assert f"decode {last} tokens" in err


@pytest.mark.parametrize("name", ["system", "template"])
def test_options_of_chats_need_a_chat(
    name: str, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "--model", model_folder, "--prompt", "x", f"--{name}", "phi4")
    assert code == 2
    assert f"--{name} is for chats; add --chat or leave it out" in err
    code, _, err = run(capsys, "--model", model_folder, "--prompt", "x", "--chat")
    assert code == 2
    assert "no chat template" in err
    code, _, err = run(
        capsys, "--model", model_folder, "--prompt", "x", "--chat", "--template", "phi4"
    )
    assert code == 2
    assert "needs the token '<|system|>'" in err


def start(*arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "sambay.cli.main", "generate", *map(str, arguments)]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_text_streams_and_ctrl_c_ends_it_cleanly(model_folder: Path) -> None:
    endless = ("--max-new-tokens", 200_000, "--temperature", 1.5, "--top-p", 1, "--seed")
    for seed in range(9):  # the tiny model may say the end token before it is interrupted
        process = start("--model", model_folder, "--prompt", PROMPT, *endless, seed)
        assert process.stdout is not None
        first = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=200)
        if process.returncode != 0:
            break
    assert process.returncode == 130
    (first + out).decode()
    assert out.endswith(b"\n")
    assert b"Traceback" not in err
    assert err.splitlines()[-1].startswith(b"prefill ")


def test_a_terminal_without_the_characters_gets_question_marks(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", terminal)
    words = ["--prompt", PROMPT, "--max-new-tokens", "60", "--temperature", "9", "--top-p", "1"]
    assert main(["generate", "--model", str(model_folder), *words]) == 0
    assert b"?" in terminal.buffer.getvalue()  # pyright: ignore


def test_weights_may_be_quantised(
    model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    words = ("--model", model_folder, "--prompt", PROMPT, "--max-new-tokens", 30)
    model = quantise(load_model_folder(model_folder), "int8")
    generator = TextGenerator(Engine(model), Tokenizer.load(model_folder))
    sampling = SamplingParams(temperature=0.8, top_p=0.95)
    text = generator.generate([PROMPT], max_new_tokens=30, sampling=sampling)[0].text
    code, out, _ = run(capsys, *words, "--weights", "int8")
    assert code == 0
    assert out == text + "\n"
    code, out, err = run(capsys, *words, "--weights", "int4")
    assert (code, out) == (2, "")
    assert "group_size = 32 divides no row to quantise (rows of " in err  # of 36 weights, or 52
    assert err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr("sambay.train.export.load_checkpoint_model", None)  # so it is not called
    code, out, err = run(capsys, *words, "--weights", "int8")
    assert (code, out) == (2, "")
    assert "quantising weights needs the package 'torchao'" in err
