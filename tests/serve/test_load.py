"""The load bench counts what a server sends and takes the right times; the server is a script."""

from __future__ import annotations

import argparse
import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from sambay.cli.bench import serving
from sambay.errors import ConfigError
from sambay.serve.load import Level, LoadFailed, Server, Workload, find_model, run_level
from sambay.serve.load_report import compare, lines, measure, throughput_at

PAUSE = 0.02


class Scripted(http.server.BaseHTTPRequestHandler):
    """Streams as many tokens as asked, `PAUSE` apart; refuses, breaks off or stops on demand."""

    protocol_version = "HTTP/1.1"
    at_once = most_at_once = 0
    guard = threading.Lock()
    bodies: ClassVar[list[dict]] = []
    how = "well"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: tests print nothing."""

    def do_GET(self) -> None:
        self._send(json.dumps({"data": [{"id": "scripted"}]}).encode(), "application/json")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        cls = type(self)
        with cls.guard:
            cls.bodies.append(body)
            cls.at_once += 1
            cls.most_at_once = max(cls.most_at_once, cls.at_once)
        try:
            self._answer(body, cls.how)
        finally:
            with cls.guard:
                cls.at_once -= 1

    def _answer(self, body: dict, how: str) -> None:
        if how == "refuses":
            self.send_response(400)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"nope")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for number in range(body["max_tokens"]):
            time.sleep(PAUSE)
            self._event({"choices": [{"text": str(number)}]})
            if how == "breaks":
                self._event({"error": {"message": "out of luck"}})
                return
        if how != "stops":
            self._event({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
            self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _event(self, values: dict) -> None:
        self.wfile.write(b"data: " + json.dumps(values).encode() + b"\n\n")
        self.wfile.flush()

    def _send(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def url() -> Iterator[str]:
    Scripted.at_once = Scripted.most_at_once = 0
    Scripted.bodies, Scripted.how = [], "well"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_tokens_and_times_of_a_level(url: str) -> None:
    server = find_model("mine", url)
    assert server.model == "scripted"
    level = run_level(server, Workload(prompt_tokens=9, new_tokens=5, requests=6), 3)
    assert (level.answered, level.failed, level.new_tokens, level.prompt_tokens) == (6, 0, 30, 54)
    assert Scripted.most_at_once == 3
    assert level.to_first[0] >= PAUSE
    assert PAUSE <= level.per_token[0] < 10 * PAUSE
    assert level.seconds >= 2 * 5 * PAUSE  # two after each other in each of three places
    assert level.new_tokens_per_second == pytest.approx(30 / level.seconds)


def test_prompts_are_bounded_and_begin_differently(url: str) -> None:
    workload = Workload(prompt_tokens=40, new_tokens=1, requests=8, vocabulary=11)
    run_level(find_model("mine", url), workload, 8)
    sent = [body["prompt"] for body in Scripted.bodies]
    assert all(len(prompt) == 40 and max(prompt) < 11 for prompt in sent)
    assert len({tuple(prompt) for prompt in sent}) == 8
    assert all(body["ignore_eos"] and body["max_tokens"] == 1 for body in Scripted.bodies)
    assert workload.prompt(3) == Workload(prompt_tokens=40, vocabulary=11).prompt(3)


@pytest.mark.parametrize(
    ("how", "words"), [("refuses", "400.*nope"), ("breaks", "out of luck"), ("stops", "ended")]
)
def test_a_server_that_answers_nothing_is_an_error_in_its_words(
    how: str, words: str, url: str
) -> None:
    Scripted.how = how
    with pytest.raises(LoadFailed, match=f"answered none of 2 requests.*{words}"):
        run_level(Server("mine", url, "scripted"), Workload(requests=2, new_tokens=2), 2)


def test_addresses_that_lead_nowhere() -> None:
    with pytest.raises(LoadFailed, match="sambay serve"):
        find_model("mine", "http://127.0.0.1:9", timeout=1)
    with pytest.raises(ConfigError, match="not the address"):
        find_model("mine", "127.0.0.1:8000")


def level(concurrency: int, speed: float, latency: float) -> Level:
    return Level(concurrency, 1, 0, 1.0, 1, int(speed), (0.1, 0.1), (latency, latency))


def test_throughput_at_equal_latency_is_read_between_levels() -> None:
    mine = [level(1, 100, 0.010), level(4, 300, 0.020)]
    theirs = [level(1, 50, 0.015), level(4, 100, 0.050)]
    assert throughput_at(mine, 0.015) == pytest.approx(200)
    assert throughput_at(mine, 0.05) is None
    (comparison,) = compare({"mine": mine, "theirs": theirs})
    assert comparison.by_concurrency == {1: 2.0, 4: 3.0}
    assert comparison.at_equal_latency == [(0.015, pytest.approx(4.0))]
    text = "\n".join(lines({"mine": mine, "theirs": theirs}, [comparison]))
    assert "4 at once: 3.00x" in text
    assert "at 15.0 ms per token: 4.00x" in text


def test_servers_take_turns_and_the_fastest_round_counts() -> None:
    calls: list[tuple[str, int, int]] = []
    speeds = iter([1, 1, 10, 20, 30, 5])  # two to warm up, then two rounds of two servers

    def run(server: Server, workload: Workload, concurrency: int) -> Level:
        calls.append((server.name, concurrency, workload.seed))
        return level(concurrency, next(speeds), 0.01)

    servers = [Server("a", "", ""), Server("b", "", "")]
    found = measure(
        servers, Workload(), [2], requests=None, rounds=2, tell=lambda line: None, run=run
    )
    assert [name for name, _, _ in calls[2:]] == ["a", "b", "a", "b"]
    assert len({seed for _, _, seed in calls[2:]}) == 2
    assert found["a"][0].new_tokens == 30
    assert found["b"][0].new_tokens == 20


def test_the_command_writes_table_and_numbers(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    serving.add_arguments(parser)
    words = [f"mine={url}", f"other={url}", "--concurrency", "1", "2", "--requests", "2"]
    words += ["--prompt-tokens", "3", "--new-tokens", "2", "--json", str(tmp_path / "x.json")]
    assert serving.run(parser.parse_args(words)) == 0
    out = capsys.readouterr().out
    assert "mine against other" in out
    values = json.loads((tmp_path / "x.json").read_text())
    assert [entry["concurrency"] for entry in values["levels"]["mine"]] == [1, 2]
    assert values["workload"]["new_tokens"] == 2
    assert set(values["comparisons"][0]["by_concurrency"]) == {"1", "2"}
    with pytest.raises(ConfigError, match="two servers"):
        serving.run(parser.parse_args([f"a={url}", f"a={url}"]))
    with pytest.raises(ConfigError, match="--new-tokens 0"):
        serving.run(parser.parse_args([url, "--new-tokens", "0"]))
