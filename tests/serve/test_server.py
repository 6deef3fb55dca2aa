"""The whole server over HTTP: official layout, chat, streams, clients that leave, bad requests."""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sambay.generate.reference import reference_generate
from sambay.hf import official
from sambay.model import LanguageModel
from tests.serve.served_models import NEEDS_VLLM, OFFICIAL, SIZES
from tests.tiny import tiny_model

pytestmark = [NEEDS_VLLM, pytest.mark.timeout(1800)]
CONTEXT, NEW = 512, 12


class Running:
    """A server that answers, and the model it has."""

    def __init__(self, model: LanguageModel, port: int, pid: int) -> None:
        self.model, self.port, self.pid = model, port, pid

    def call(self, path: str, body: Any, method: str = "POST") -> tuple[int, Any]:
        """The status and the JSON of the answer; `body` is sent as it is if it is bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
            return response.status, json.loads(content) if content else None
        finally:
            connection.close()

    def complete(self, prompt: Any, **fields: Any) -> tuple[int, Any]:
        """A greedy completion."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": NEW, "temperature": 0.0}
        return self.call(
            "/v1/completions", body | {"ignore_eos": True, "return_token_ids": True} | fields
        )

    def stream(self, prompt: list[int], new: int, stop_after: int | None = None) -> list[int]:
        """The token ids of a streamed answer; the connection is cut after `stop_after` of them."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        body = {
            "model": "tiny", "prompt": prompt, "max_tokens": new, "temperature": 0.0,
            "ignore_eos": True, "stream": True, "return_token_ids": True,
        }  # fmt: skip
        ids: list[int] = []
        try:
            connection.request(
                "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            assert response.status == 200, response.read()
            for line in response:
                text = line.strip().removeprefix(b"data: ")
                if text and text != b"[DONE]":
                    for choice in json.loads(text)["choices"]:
                        ids += choice["token_ids"]
                if stop_after is not None and len(ids) >= stop_after:
                    break
        finally:
            connection.close()
        return ids

    def answer(self, prompt: list[int], new: int = NEW) -> list[int]:
        """What the model itself says."""
        return reference_generate(self.model, prompt, new)[0]

    def memory(self) -> int:
        """The resident bytes of the server and all its processes."""
        total = 0
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.getpgid(int(folder.name)) == self.pid:
                    pages = int((folder / "statm").read_text().split()[1])
                    total += pages * os.sysconf("SC_PAGE_SIZE")
            except (OSError, IndexError):  # ended meanwhile
                continue
        return total


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`sambay serve`'s server on an official folder with a byte tokenizer and a chat template."""
    from sambay.serve.command import ServerOptions, running_server
    from tests.hf.tiny_chat import chat_tokenizer

    torch.use_deterministic_algorithms(False)
    folder = tmp_path_factory.mktemp("server") / "model"
    shape = SIZES | OFFICIAL | {"vocab_size": 261}
    model = tiny_model("sambay+da", dtype=torch.float32, **shape)
    official.save(folder, model)
    chat_tokenizer().save_pretrained(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ServerOptions(
        port=port, name="tiny", dtype="float32", max_length=CONTEXT, compiled=False, cache_gib=1,
        further=("--max-num-batched-tokens", "192", "--max-num-seqs", "16"),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)  # of the other tests
        with running_server(folder, options, timeout=1500) as process:
            yield Running(model, port, process.pid)
    assert process.poll() is not None


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(5, 261, (17 * number % 290 + 1,), generator=generator).tolist()
        for number in range(count)
    ]


def test_16_streams_at_once_say_what_the_model_says(server: Running) -> None:
    asked = prompts(32)
    expected = [server.answer(prompt) for prompt in asked]
    for _ in range(2):  # the second time from the cache
        assert in_parallel(server, asked, 16) == expected


def in_parallel(server: Running, asked: list[list[int]], threads: int) -> list[list[int]]:
    results: list[list[int]] = [[] for _ in asked]
    numbers = iter(range(len(asked)))
    guard = threading.Lock()

    def work() -> None:
        while True:
            with guard:
                number = next(numbers, None)
            if number is None:
                return
            results[number] = server.stream(asked[number], NEW)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return results


def test_chat_uses_the_template_and_answers(server: Running) -> None:
    body = {
        "model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5,
        "temperature": 0.0, "ignore_eos": True, "return_token_ids": True,
        "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    status, answer = server.call("/v1/chat/completions", body)
    assert status == 200, answer
    choice = answer["choices"][0]
    assert choice["token_ids"] == server.answer(answer["prompt_token_ids"], 5)
    assert len(choice["logprobs"]["content"]) == 5


def test_structured_output_is_kept_to(server: Running) -> None:
    fields = {"structured_outputs": {"choice": ["yes", "no"]}, "ignore_eos": False}
    status, answer = server.complete("hello", **fields)
    assert status == 200, answer
    assert answer["choices"][0]["text"] in ("yes", "no")


def test_clients_that_leave_cost_nobody_anything(server: Running) -> None:
    stayed = prompts(4, seed=3)
    expected = [server.answer(prompt) for prompt in stayed]
    for prompt in prompts(12, seed=4):
        assert len(server.stream(prompt, 200, stop_after=2)) >= 2
    assert in_parallel(server, stayed, 4) == expected
    end = time.monotonic() + 60
    while running(server) and time.monotonic() < end:
        time.sleep(0.5)
    assert running(server) == 0


def running(server: Running) -> float:
    """How many requests the server works on."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return sum(
        float(line.rpartition(" ")[2])
        for line in lines
        if line.startswith("vllm:num_requests_running")
    )


BAD: list[tuple[str, Any]] = [
    ("too long", {"prompt": [7] * (CONTEXT + 1)}),
    ("unknown model", {"model": "another", "prompt": [7]}),
    ("wrong type of prompt", {"prompt": {"a": 1}}),
    ("wrong type of number", {"prompt": [7], "max_tokens": "many"}),
    ("not a token", {"prompt": [10**6]}),
    ("negative length", {"prompt": [7], "max_tokens": -3}),
    ("huge n", {"prompt": [7], "n": 10**7}),
    ("huge temperature", {"prompt": [7], "temperature": -1.0}),
    ("log-probabilities of a prompt that is not computed", {"prompt": [7], "prompt_logprobs": 1}),
    ("no JSON", b'{"model": "tiny", "prompt": '),
]


@pytest.mark.parametrize(("what", "fields"), BAD, ids=[what for what, _ in BAD])
def test_bad_requests_are_refused_and_the_next_is_answered(
    what: str, fields: Any, server: Running
) -> None:
    if isinstance(fields, bytes):
        status, answer = server.call("/v1/completions", fields)
    else:
        status, answer = server.complete(**fields)
    assert 400 <= status < 500, (what, status, answer)
    prompt = [9, 8, 7]
    status, answer = server.complete(prompt)
    assert status == 200, answer
    assert answer["choices"][0]["token_ids"] == server.answer(prompt)


@pytest.mark.slow
def test_ten_minutes_of_16_streams_lose_nothing_and_no_memory(server: Running) -> None:
    asked = prompts(48, seed=9)
    expected = [server.answer(prompt) for prompt in asked]
    assert in_parallel(server, asked, 16) == expected
    seconds = float(os.environ.get("SAMBAY_LOAD_SECONDS", "600"))
    start = time.monotonic()
    before, rounds = server.memory(), 0
    while time.monotonic() - start < seconds:
        assert in_parallel(server, asked, 16) == expected, f"round {rounds}"
        rounds += 1
    assert rounds > 1
    assert server.memory() < before * 1.05 + 2**26
