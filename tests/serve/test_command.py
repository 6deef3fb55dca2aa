"""The command that starts a server, its environment, and that nothing of it stays behind."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sambay.cli import serve
from sambay.errors import CheckpointMismatch, ConfigError, MissingPackage
from sambay.model.folder import save_model_folder
from sambay.serve import command
from sambay.serve.command import (
    ServerFailed,
    ServerOptions,
    end_group,
    is_healthy,
    running_server,
    server_command,
    server_environment,
)
from tests.tiny import tiny_model

# A server with a process of its own, as vLLM's has, that answers /health.
PRETENDER = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, file=open(sys.argv[2], "w"), flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *args): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model_folder(tmp_path / "tiny", tiny_model("sambay", dtype=torch.float32))
    return tmp_path / "tiny"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1][:3]
    except OSError:
        return False


def test_defaults_fit_the_model(folder: Path, tmp_path: Path) -> None:
    words = server_command(folder, ServerOptions())
    assert words[1:3] == ["-m", command.MODULE]
    for expected in ("--kv-sharing-fast-prefill", "--enable-prefix-caching"):
        assert expected in words
    assert words[words.index("--served-model-name") + 1] == "tiny"
    assert words[words.index("--max-model-len") + 1] == "auto"
    assert "--skip-tokenizer-init" in words  # there is none in the folder
    save_model_folder(tmp_path / "samba", tiny_model("samba", dtype=torch.float32))
    assert "--kv-sharing-fast-prefill" not in server_command(tmp_path / "samba", ServerOptions())
    with pytest.raises(ConfigError, match="--fast-prefill"):
        server_command(tmp_path / "samba", ServerOptions(fast_prefill=True))
    with pytest.raises(CheckpointMismatch, match="nowhere"):
        server_command(tmp_path / "nowhere", ServerOptions())


def test_options_are_passed_on(folder: Path) -> None:
    options = ServerOptions(
        name="x", dtype="float32", max_length=77, processes=2, prefix_caching=False,
        fast_prefill=False, compiled=False, cache_gib=3, further=("--max-num-seqs", "4"),
    )  # fmt: skip
    words = server_command(folder, options)
    assert "--no-enable-prefix-caching" in words
    assert "--enforce-eager" in words
    assert "--kv-sharing-fast-prefill" not in words
    assert words[words.index("--max-model-len") + 1] == "77"
    assert words[words.index("--tensor-parallel-size") + 1] == "2"
    assert words[-2:] == ["--max-num-seqs", "4"]
    environment = server_environment(options, {"PATH": "p", "HF_HUB_OFFLINE": "0"})
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert environment["HF_HUB_OFFLINE"] == "0"  # what the user says counts
    if len(os.sched_getaffinity(0)) >= 2:
        assert environment["VLLM_CPU_OMP_THREADS_BIND"].count("|") == 1


def test_a_server_is_waited_for_and_ends_with_its_processes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, file = free_port(), tmp_path / "pid"
    words = [sys.executable, "-c", PRETENDER, str(port), str(file)]
    monkeypatch.setattr(command, "server_command", lambda folder, options: words)
    monkeypatch.setattr(command, "refuse_other_versions", lambda: None)
    options = ServerOptions(port=port)
    with running_server(folder, options, timeout=60) as process:
        assert is_healthy(options)
        child = int(file.read_text())
        assert is_alive(process.pid)
        assert is_alive(child)
        with pytest.raises(ConfigError, match=f"--port {port} cannot be used"):
            command.refuse_taken_port(options)
    assert process.poll() is not None
    end = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_alive(child)


def terminate_this_process() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)  # interrupted at once


def test_a_terminated_command_takes_its_server_with_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, file = free_port(), tmp_path / "pid"
    words = [sys.executable, "-c", PRETENDER, str(port), str(file)]
    monkeypatch.setattr(command, "server_command", lambda folder, options: words)
    monkeypatch.setattr(command, "refuse_other_versions", lambda: None)
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(SystemExit, match="143"),
        running_server(folder, ServerOptions(port=port), timeout=60) as process,
    ):
        terminate_this_process()
    assert process.poll() is not None
    assert not is_alive(int(file.read_text()))
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_server_that_ends_or_is_silent_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "refuse_other_versions", lambda: None)
    options = ServerOptions(port=free_port())
    for code, timeout, words in (
        ("raise SystemExit(3)", 60, "code 3"),
        ("import time; time.sleep(600)", 0.1, "did not answer within"),
    ):
        started = [sys.executable, "-c", code]
        monkeypatch.setattr(command, "server_command", lambda *_, started=started: started)
        with (
            pytest.raises(ServerFailed, match=words),
            running_server(folder, options, timeout=timeout),
        ):
            pass


def test_without_vllm_the_remedy_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sambay.serve import versions

    monkeypatch.setattr(versions, "DISTRIBUTIONS", ("vllm-that-nobody-has",))
    with (
        pytest.raises(MissingPackage, match=r"sambay\[vllm\]"),
        running_server(folder, ServerOptions(port=free_port())),
    ):
        pass


def test_ending_what_has_ended_is_no_error() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    process.wait()
    end_group(process)
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "0"], "--port 0"),
        (["--max-length", "0"], "--max-length 0"),
        (["--tensor-parallel", "-1"], "--tensor-parallel -1"),
        (["--timeout", "0"], "--timeout 0"),
    ],
)
def test_numbers_that_cannot_be(words: list[str], message: str, folder: Path) -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    with pytest.raises(ConfigError, match=message):
        serve.run(parser.parse_args([str(folder), *words]))


def test_a_run_directory_stands_for_its_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    folder.rename(tmp_path / "mine" / serve.RUN_MODEL)
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    assert serve.run(parser.parse_args([str(tmp_path / "mine"), "--dry-run"])) == 0
    printed = capsys.readouterr().out
    assert f"--model {tmp_path / 'mine' / serve.RUN_MODEL} " in printed
    assert "--served-model-name mine " in printed


def test_dry_run_prints_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    words = [str(folder), "--dry-run", "--eager", "--", "--max-num-seqs", "3"]
    assert serve.run(parser.parse_intermixed_args(words)) == 0
    printed = capsys.readouterr().out
    assert "--enforce-eager" in printed
    assert printed.rstrip().endswith("--max-num-seqs 3")
