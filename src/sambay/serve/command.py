"""The server as a process: which options suit a model, starting it, waiting for it, ending it."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from sambay.errors import ConfigError, SambayError
from sambay.hf.loading import read_config
from sambay.model.folder import TOKENIZER_FILE
from sambay.serve.versions import refuse_other_versions
from sambay.spec import LayerKind, ModelConfig, prefill_split

MODULE = "vllm.entrypoints.openai.api_server"
_POLL_SECONDS = 0.5
_END_SECONDS = 20.0  # what a server gets to finish before it is killed


class ServerFailed(SambayError):
    """A server that ended, or did not come up in time; its own words stand above."""


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """What `sambay serve` decides about a server; everything else is vLLM's own default.

    max_length: of prompt and answer together; None for the longest that fits in memory.
    fast_prefill: None for yes where the model has a cross-decoder.
    cache_gib: of memory for states and keys on a CPU; None leaves it to vLLM.
    further: options of vLLM, passed on as they are.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    dtype: str = "auto"
    max_length: int | None = None
    processes: int = 1
    prefix_caching: bool = True
    fast_prefill: bool | None = None
    compiled: bool = True
    cache_gib: int | None = None
    further: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        """Where the server is reached from this machine."""
        host = _reachable(self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


def server_command(folder: Path, options: ServerOptions) -> list[str]:
    """The command that starts vLLM's server with a model folder.

    Raises:
        CheckpointMismatch: no model folder, or a configuration that cannot work.
        ConfigError: fast prefill for a model that has no cross-decoder to leave out.
    """
    config = read_config(folder)
    fast = saves_prefill(config) if options.fast_prefill is None else options.fast_prefill
    if fast and not saves_prefill(config):
        raise ConfigError(
            "--fast-prefill: this model has no cross-attention behind its last layer with state, "
            "nothing can be left out; leave out the option"
        )
    words = [sys.executable, "-m", MODULE, "--model", str(folder)]
    words += ["--host", options.host, "--port", str(options.port)]
    words += ["--served-model-name", options.name or folder.resolve().name]
    words += ["--dtype", options.dtype]
    words += ["--max-model-len", "auto" if options.max_length is None else str(options.max_length)]
    words += ["--tensor-parallel-size", str(options.processes)]
    words.append(f"--{'' if options.prefix_caching else 'no-'}enable-prefix-caching")
    if fast:
        words.append("--kv-sharing-fast-prefill")
    if not options.compiled:
        words.append("--enforce-eager")
    if not (folder / TOKENIZER_FILE).exists():
        words.append("--skip-tokenizer-init")
    return [*words, *options.further]


def saves_prefill(config: ModelConfig) -> bool:
    """Whether vLLM can leave the cross-decoder out of the prefill of this model."""
    behind = config.layers[prefill_split(config.layers) + 1 :]
    return any(layer.kind is LayerKind.CROSS for layer in behind)


def server_environment(options: ServerOptions, given: Mapping[str, str]) -> dict[str, str]:
    """The environment of the server: `given`, with what a local model needs where it says nothing.

    A folder on this machine needs no hub, and nobody is told that it is served.
    """
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **given}
    if options.cache_gib is not None:
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(options.cache_gib)
    if options.processes > 1 and "VLLM_CPU_OMP_THREADS_BIND" not in environment:
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        if len(cores) >= options.processes:  # vLLM asks for a NUMA node per process else
            share = len(cores) // options.processes
            groups = [cores[rank * share : (rank + 1) * share] for rank in range(options.processes)]
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(
                ",".join(map(str, group)) for group in groups
            )
    return environment


def refuse_taken_port(options: ServerOptions) -> None:
    """Say at once what vLLM would say after a minute.

    Raises:
        ConfigError: the port is taken, or the host is none of this machine.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except OSError as error:
            raise ConfigError(
                f"--host {options.host} --port {options.port} cannot be used ({error.strerror}); "
                "choose another port"
            ) from error


@contextlib.contextmanager
def running_server(
    folder: Path,
    options: ServerOptions,
    *,
    timeout: float = 1800.0,
    output: int | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[subprocess.Popen[bytes]]:
    """The process of a server that answers; it is ended, with its own processes, behind the block.

    output: where it writes, as `subprocess` takes it; None for where this process does.

    Raises:
        MissingPackage, BackendUnavailable: no vLLM, or none that is supported.
        CheckpointMismatch, ConfigError: what cannot be served.
        ServerFailed: it ended by itself, or did not answer within `timeout` seconds.
    """
    refuse_other_versions()
    command = server_command(folder, options)
    refuse_taken_port(options)
    environment = server_environment(options, os.environ)
    # A group of its own: what it starts in turn is found again at the end.
    process = subprocess.Popen(
        command, env=environment, stdout=output, stderr=output, start_new_session=True
    )
    try:
        with _ended_politely():
            _wait_until_healthy(process, options, timeout, sleep)
            yield process
    finally:
        end_group(process)


@contextlib.contextmanager
def _ended_politely() -> Iterator[None]:
    """SIGTERM leaves the block as an exception, or it would leave the server running."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # which alone may ask for that
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a server and everything it started, gently first."""
    for how, seconds in ((signal.SIGTERM, _END_SECONDS), (signal.SIGKILL, _END_SECONDS)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            if how is signal.SIGTERM:
                time.sleep(_POLL_SECONDS)  # its children follow
                continue
            return


def is_healthy(options: ServerOptions) -> bool:
    """Whether a server answers there."""
    connection = http.client.HTTPConnection(_reachable(options.host), options.port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::", "") else host


def _wait_until_healthy(
    process: subprocess.Popen[bytes],
    options: ServerOptions,
    timeout: float,
    sleep: Callable[[float], None],
) -> None:
    end = time.monotonic() + timeout
    while not is_healthy(options):
        if process.poll() is not None:
            raise ServerFailed(
                f"the server ended with code {process.returncode} before it answered; "
                "its own words above say why"
            )
        if time.monotonic() > end:
            raise ServerFailed(
                f"the server did not answer within {timeout:.0f} seconds; give it more time, or a "
                "smaller model"
            )
        sleep(_POLL_SECONDS)


def quoted(words: Sequence[str]) -> str:
    """A command as one would type it."""
    import shlex

    return shlex.join(words)
