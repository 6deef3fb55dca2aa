"""A server as a backend: a small one on this machine, with our engine behind it, and its faults."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from sambay.errors import ConfigError
from sambay.evals.backends.engine import EngineBackend, score_plainly
from sambay.evals.backends.json_client import JsonClient, ServerError
from sambay.evals.backends.server import ServerBackend
from sambay.evals.calls import Answer, Call, Passage, Score
from sambay.generate.reference import reference_generate
from sambay.generate.sampling import SamplingParams
from sambay.hf.loading import load_model
from tests.evals.small_models import chat_folder, engine_on, text_side

Fault = Callable[[BaseHTTPRequestHandler, dict[str, Any]], bool]
"""Answers a request in the wrong way; False where the request is to be answered well."""


class Loopback:
    """What vLLM answers, computed by our engine.

    Attributes:
        fault: asked first at every POST.
        seen: the bodies of all POSTs.
    """

    def __init__(self, folder: Path, name: str = "org/tiny") -> None:
        self.backend: EngineBackend = engine_on(folder)
        self.model = load_model(folder)
        self.tokenizer = text_side(folder).tokenizer
        self.name = name
        self.fault: Fault = lambda handler, body: False
        self.listed: list[dict[str, Any]] = [
            {"id": name, "created": 123, "max_model_len": 400, "permission": [{"id": "random"}]}
        ]
        self.seen: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        loopback = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                reply(self, 200, {"object": "list", "data": loopback.listed})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                loopback.seen.append(body)
                if not loopback.fault(self, body):
                    loopback.answer(self, body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if body["model"] != self.name:
            words = f"The model `{body['model']}` does not exist."
            reply(handler, 404, {"error": {"message": words, "code": 404}})
            return
        if body.get("echo"):
            reply(handler, 200, {"choices": [{"text": "", "logprobs": self.logprobs(body)}]})
            return
        chat = handler.path == "/v1/chat/completions"
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        if not isinstance(prompt, str):
            prompt = self.tokenizer.decode(prompt)
        names = ("temperature", "top_p", "seed", "top_k", "repetition_penalty")
        sampling = SamplingParams(**{name: body[name] for name in names if name in body})
        call = Call(prompt, body["max_tokens"], tuple(body.get("stop", ())), sampling, chat)
        found: list[Answer] = []
        with self._lock:  # the engine knows one caller at a time
            self.backend.generate([call], lambda number, answer: found.append(answer))
        text = found[0].text
        said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        choice = {**said, "finish_reason": found[0].finish_reason}
        usage = {"completion_tokens": found[0].num_tokens}
        reply(handler, 200, {"choices": [choice], "usage": usage})

    def logprobs(self, body: dict[str, Any]) -> dict[str, Any]:
        """Those of the prompt and of one token more, which nobody asked for."""
        ids = body["prompt"]
        with self._lock, torch.inference_mode():
            logprobs_TV = self.model(torch.tensor([ids])).log_softmax(-1)[0]
        chosen = [float(logprobs_TV[n, token]) for n, token in enumerate(ids[1:])]
        best = logprobs_TV.max(-1)
        tops = [
            {f"t{token}": value}
            for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        tops = [top | {"own": one} for top, one in zip(tops[:-1], chosen, strict=True)] + tops[-1:]
        return {
            "token_logprobs": [None, *chosen, best.values.tolist()[-1]],
            "top_logprobs": [None, *tops],
        }


def reply(handler: BaseHTTPRequestHandler, code: int, value: Any, **headers: str) -> None:
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    handler.send_response(code)
    for name, text in headers.items():
        handler.send_header(name.replace("_", "-"), text)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("server") / "tiny")


@pytest.fixture(scope="module")
def _loopback(folder: Path) -> Iterator[Loopback]:
    loopback = Loopback(folder)
    yield loopback
    loopback.server.shutdown()
    loopback.server.server_close()


@pytest.fixture
def loopback(_loopback: Loopback) -> Loopback:
    """The server, well behaved again."""
    _loopback.fault = lambda handler, body: False
    _loopback.seen.clear()
    return _loopback


@pytest.fixture
def slept() -> list[float]:
    return []


@pytest.fixture
def client(loopback: Loopback, slept: list[float]) -> JsonClient:
    """With four attempts, between which nobody waits."""
    return JsonClient(loopback.url + "/v1/", waits=(1, 2, 4), sleep=slept.append)


def calls() -> list[Call]:
    drawn = SamplingParams(temperature=1.2, top_k=20, top_p=0.9, seed=2**40 + 7)
    return [
        Call("one", 6),
        Call("a longer prompt", 9, ("e", "\0")),
        Call("Straße 猫", 4, chat=True),
        Call("one", 8, sampling=drawn),
    ]


def answers(backend: Any, asked: list[Call]) -> list[Answer]:
    found: dict[int, Answer] = {}
    backend.generate(asked, found.__setitem__)
    return [found[number] for number in range(len(asked))]


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_the_server_gives_what_its_engine_gives(
    with_tokenizer: bool, loopback: Loopback, client: JsonClient, folder: Path
) -> None:
    prompts = text_side(folder) if with_tokenizer else None
    backend = ServerBackend(client, "org/tiny", prompts)
    found = answers(backend, calls())
    assert found[:3] == answers(engine_on(folder), calls()[:3])
    # Seeds are shortened, the same way each time.
    assert found == answers(backend, calls())
    bodies = {str(body.get("prompt") or "chat"): body for body in loopback.seen}
    plain = str(text_side(folder).tokenizer.encode("one")) if with_tokenizer else "one"
    drawn = [body for body in loopback.seen if body["temperature"] == 1.2]
    assert {body["seed"] for body in drawn} == {7}
    assert {body["top_k"] for body in drawn} == {20}
    assert bodies["chat"]["messages"] == [{"role": "user", "content": "Straße 猫"}]
    assert plain in bodies
    greedy = next(body for body in loopback.seen if body.get("max_tokens") == 6)
    assert "top_k" not in greedy  # which strict servers do not know
    assert "stop" not in greedy


def test_facts_and_context_are_what_the_server_says_without_times(
    loopback: Loopback, client: JsonClient, folder: Path
) -> None:
    backend = ServerBackend(client, "org/tiny")
    assert backend.facts == {
        "name": "tiny",
        "backend": "server",
        "model": "org/tiny",
        "reported": {"id": "org/tiny", "max_model_len": 400},
    }
    assert backend.max_context is None  # prompts cannot be measured
    known = ServerBackend(client, "org/tiny", text_side(folder))
    assert known.max_context == 400
    assert known.facts["tokenizer_sha256"] == text_side(folder).tokenizer.sha256
    assert known.prompt_length(Call("one", 1, chat=True)) == 6
    assert ServerBackend(client, "org/tiny", text_side(folder), max_context=7).max_context == 7
    for use in (lambda: backend.encode("x"), lambda: backend.prompt_length(Call("x", 1))):
        with pytest.raises(ConfigError, match="give --tokenizer"):
            use()
    with pytest.raises(ConfigError, match="--max-context needs --tokenizer"):
        ServerBackend(client, "org/tiny", max_context=7)


def test_scores_come_from_the_logprobs_of_the_prompt(
    loopback: Loopback, client: JsonClient, folder: Path
) -> None:
    backend = ServerBackend(client, "org/tiny", text_side(folder))
    said, _ = reference_generate(load_model(folder), [9, 8, 7], 3)
    passages = [
        Passage((9, 8, 7), (6, 5)),
        Passage((9,), (200,)),
        Passage((9, 8, 7), tuple(said)),
    ]
    found: dict[int, Score] = {}
    backend.score(passages, found.__setitem__)
    for number, passage in enumerate(passages):
        plain = score_plainly(load_model(folder), passage)
        assert found[number].logprob == pytest.approx(plain.logprob, abs=1e-5)
        assert found[number].is_greedy == plain.is_greedy
    assert found[2].is_greedy
    with pytest.raises(ConfigError, match="scoring passages needs token ids; give --tokenizer"):
        ServerBackend(client, "org/tiny").score(passages, found.__setitem__)
    with pytest.raises(ConfigError, match="passage 1 has 400 tokens and takes one more"):
        backend.score([passages[0], Passage((5,) * 399, (5,))], found.__setitem__)
    for logprobs in (None, {"token_logprobs": [None]}, {"token_logprobs": [None, -1.0, -1.0]}):
        loopback.fault = lambda handler, body, kept=logprobs: (
            reply(handler, 200, {"choices": [{"text": "", "logprobs": kept}]}) or True
        )
        with pytest.raises(ServerError, match="does not give the log-probabilities of a prompt"):
            backend.score(passages, found.__setitem__)


def test_only_so_many_requests_are_on_their_way(loopback: Loopback, client: JsonClient) -> None:
    meeting = threading.Barrier(3, timeout=20)  # three come, or this test fails
    lock, here, most = threading.Lock(), [0], [0]

    def wait(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> bool:
        with lock:
            here[0] += 1
            most[0] = max(most[0], here[0])
        meeting.wait()
        with lock:
            here[0] -= 1
        return False

    backend = ServerBackend(client, "org/tiny", requests=3)
    loopback.fault = wait
    answers(backend, [Call("one", 1)] * 9)
    assert most == [3]


def failing(times: int, how: Callable[[BaseHTTPRequestHandler], object]) -> Fault:
    """Go wrong so many times, and then no more."""
    left = [times]

    def fault(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> bool:
        left[0] -= 1
        if left[0] < 0:
            return False
        how(handler)
        return True

    return fault


def drop(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
    handler.connection.close()
    handler.wfile = handler.rfile = open("/dev/null", "rb+", buffering=0)  # noqa: SIM115


@pytest.mark.parametrize(
    ("how", "waits"),
    [
        (lambda handler: reply(handler, 500, b"oops"), [1, 2]),
        (lambda handler: reply(handler, 503, {"error": {"message": "loading"}}), [1, 2]),
        (lambda handler: reply(handler, 429, {}, Retry_After="3"), [3, 3]),
        (drop, [1, 2]),
    ],
)
def test_what_may_pass_is_tried_again_after_growing_waits(
    how: Callable[[BaseHTTPRequestHandler], object], waits: list[float],
    loopback: Loopback, client: JsonClient, slept: list[float], folder: Path,
) -> None:  # fmt: skip
    backend = ServerBackend(client, "org/tiny")
    loopback.fault = failing(2, how)
    assert answers(backend, calls()[:1]) == answers(engine_on(folder), calls()[:1])
    assert slept == waits
    loopback.fault = failing(4, how)
    with pytest.raises(ServerError, match=r"question 1 of 1: .* gave up after 4 attempts"):
        answers(backend, calls()[:1])


@pytest.mark.parametrize(
    ("code", "value", "message"),
    [
        (400, {"error": {"message": "This model's maximum\ncontext length is 9"}},
         r"refuses \(400\): This model's maximum context length is 9"),
        (422, {"detail": "Unexpected fields in the request"}, r"\(422\): Unexpected fields"),
        (401, b"<html>who are you", r"\(401\): <html>who are you"),
        (200, b"{broken", r"answers with no JSON \(b'{broken'\)"),
        (200, [1], r"answers with \[1\], not with a JSON object"),
        (200, {"object": "error"}, "answers without choices"),
        (200, {"choices": [{"finish_reason": "stop"}]}, "answers without text"),
        (200, {"choices": [{"text": "x"}]}, "does not say how many tokens an answer has"),
    ],
)  # fmt: skip
def test_what_will_not_pass_is_one_line_at_once(
    code: int, value: Any, message: str,
    loopback: Loopback, client: JsonClient, slept: list[float],
) -> None:  # fmt: skip
    backend = ServerBackend(client, "org/tiny")
    loopback.fault = failing(1, lambda handler: reply(handler, code, value))
    with pytest.raises(ServerError, match=message) as caught:
        answers(backend, calls()[:1])
    assert "\n" not in str(caught.value)
    assert slept == []


def test_answers_before_a_refusal_are_kept_and_nothing_more_is_asked(
    loopback: Loopback, client: JsonClient
) -> None:
    backend = ServerBackend(client, "org/tiny", requests=1)
    loopback.fault = lambda handler, body: (
        body["prompt"] == "bad" and (reply(handler, 400, {"message": "bad"}) or True)
    )
    found: dict[int, Answer] = {}
    asked = [Call("one", 1), Call("bad", 1), *[Call("two", 1)] * 20]
    with pytest.raises(ServerError, match=r"question 2 of 22: .*\(400\): bad"):
        backend.generate(asked, found.__setitem__)
    assert list(found) == [0]
    assert len(loopback.seen) < 6


def test_a_stop_string_that_the_server_leaves_in_is_cut_off(
    loopback: Loopback, client: JsonClient, folder: Path
) -> None:
    """transformers does so; and without `usage` tokens are counted here."""
    choices = [{"text": "a line\nanother", "finish_reason": "length"}]
    backend = ServerBackend(client, "org/tiny", text_side(folder))
    loopback.fault = lambda handler, body: reply(handler, 200, {"choices": choices}) or True
    found = answers(backend, [Call("x", 40, ("\n",)), Call("x", 14)])
    assert found == [Answer("a line", 7, "stop"), Answer("a line\nanother", 14, "length")]


def test_thinking_that_a_server_takes_out_belongs_to_the_answer(
    loopback: Loopback, client: JsonClient
) -> None:
    message = {"content": "4", "reasoning_content": "2 and 2"}
    value = {"choices": [{"message": message}], "usage": {"completion_tokens": 5}}
    loopback.fault = lambda handler, body: reply(handler, 200, value) or True
    backend = ServerBackend(client, "org/tiny")
    found = answers(backend, [Call("x", 9, chat=True)])
    assert found == [Answer("<think>2 and 2</think>4", 5, "stop")]


def test_models_that_are_not_there(
    loopback: Loopback, client: JsonClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ServerError) as caught:
        ServerBackend(client, "org/tinny")
    assert "has no model 'org/tinny' (did you mean 'org/tiny'?)" in str(caught.value)
    assert "The model `org/tinny` does not exist." in str(caught.value)
    # Some servers list other models than those they take.
    monkeypatch.setattr(loopback, "listed", [])
    assert ServerBackend(client, "org/tiny").facts["reported"] == {}


def test_servers_that_are_not_there(slept: list[float]) -> None:
    with pytest.raises(ConfigError, match="is not the address of a server"):
        JsonClient("127.0.0.1:8000")
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        port = server.server_port
    client = JsonClient(f"http://127.0.0.1:{port}", waits=(1, 2), sleep=slept.append)
    with pytest.raises(ServerError, match=re.escape("cannot be reached ([Errno 111]")):
        ServerBackend(client, "m")
    assert slept == [1, 2]


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(
    loopback: Loopback, client: JsonClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert JsonClient(loopback.url).get("/v1/models")["object"] == "list"
