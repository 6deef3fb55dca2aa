"""A client that keeps an OpenAI-compatible server busy and takes the time of every token.

Requests are random token ids of one length, answered up to a fixed number of tokens, as in the
paper's measurements (arXiv 2507.06607, section 3.4: 512 + 2,048 and more). The number of requests,
their lengths and how many are on their way at once are all bounded, and so is the wait for each.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import random
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

from sambay.errors import ConfigError, SambayError


class LoadFailed(SambayError):
    """A server that cannot be reached, or that answered no request of a level."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is asked.

    vocabulary: ids are drawn below it; every tokenizer of a server must have so many.
    timeout: seconds until a request counts as lost.
    """

    prompt_tokens: int = 512
    new_tokens: int = 2048
    requests: int = 16
    vocabulary: int = 256
    timeout: float = 600.0
    seed: int = 0

    def prompt(self, number: int) -> list[int]:
        """The token ids of one request; no two begin alike, so that no cache helps."""
        draw = random.Random(f"{self.seed} {number}")
        return [draw.randrange(self.vocabulary) for _ in range(self.prompt_tokens)]


@dataclasses.dataclass(frozen=True)
class Server:
    """A server and what the model is called there."""

    name: str
    url: str
    model: str


@dataclasses.dataclass(frozen=True)
class Timing:
    """Of one request: seconds since the level began. `new_tokens` is what the server counted."""

    sent: float
    first: float
    last: float
    new_tokens: int

    @property
    def seconds_per_token(self) -> float:
        """Between the first and the last token."""
        return (self.last - self.first) / max(self.new_tokens - 1, 1)


@dataclasses.dataclass(frozen=True)
class Level:
    """What one level of concurrency gave; times in seconds.

    `to_first` and `per_token` have the median and the 95th percentile over the requests.
    """

    concurrency: int
    answered: int
    failed: int
    seconds: float
    prompt_tokens: int
    new_tokens: int
    to_first: tuple[float, float]
    per_token: tuple[float, float]

    @property
    def new_tokens_per_second(self) -> float:
        """Of all requests together."""
        return self.new_tokens / self.seconds


def find_model(name: str, url: str, timeout: float = 10.0) -> Server:
    """The server at an address, with the first model it names.

    Raises:
        ConfigError: not the address of a server.
        LoadFailed: nothing answers there, or it names no model.
    """
    connection = _connect(url, timeout)
    try:
        connection.request("GET", "/v1/models")
        listed = json.loads(connection.getresponse().read())
        return Server(name, url, listed["data"][0]["id"])
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
        raise LoadFailed(
            f"{url} names no model ({error}); start one with `sambay serve FOLDER`"
        ) from error
    finally:
        connection.close()


def run_level(
    server: Server,
    workload: Workload,
    concurrency: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Level:
    """Send the requests of a workload, `concurrency` at a time, and wait for all.

    Raises:
        LoadFailed: not one was answered; says why the last was not.
    """
    numbers = iter(range(workload.requests))
    guard = threading.Lock()
    timings: list[Timing] = []
    problems: list[str] = []
    start = clock()

    def work() -> None:
        while True:
            with guard:
                number = next(numbers, None)
            if number is None:
                return
            try:
                timing = _ask(server, workload, number, lambda: clock() - start)
            except (OSError, http.client.HTTPException, ValueError, LoadFailed) as error:
                with guard:
                    problems.append(f"{type(error).__name__}: {error}")
                continue
            with guard:
                timings.append(timing)

    threads = [threading.Thread(target=work) for _ in range(min(concurrency, workload.requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not timings:
        raise LoadFailed(
            f"{server.url} answered none of {workload.requests} requests; the last: {problems[-1]}"
        )
    return Level(
        concurrency=concurrency,
        answered=len(timings),
        failed=len(problems),
        seconds=max(timing.last for timing in timings) - min(timing.sent for timing in timings),
        prompt_tokens=workload.prompt_tokens * len(timings),
        new_tokens=sum(timing.new_tokens for timing in timings),
        to_first=_percentiles([timing.first - timing.sent for timing in timings]),
        per_token=_percentiles([timing.seconds_per_token for timing in timings]),
    )


def _ask(server: Server, workload: Workload, number: int, elapsed: Callable[[], float]) -> Timing:
    body = {
        "model": server.model,
        "prompt": workload.prompt(number),
        "max_tokens": workload.new_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,  # of vLLM: answers of one length
    }
    connection = _connect(server.url, workload.timeout)
    try:
        sent = elapsed()
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        if response.status != 200:
            words = response.read().decode("utf-8", "replace")
            raise LoadFailed(f"refused ({response.status}): {words[:300]}")
        first = last = 0.0
        counted: int | None = None
        for line in response:
            event = _event(line)
            if event is None:
                continue
            if event.get("choices"):
                last = elapsed()
                first = first or last
            usage = event.get("usage")
            if isinstance(usage, dict):
                counted = usage.get("completion_tokens")
        if counted is None or not first:
            raise LoadFailed("the answer ended before it said how many tokens it had")
        return Timing(sent, first, last, counted)
    finally:
        connection.close()


def _event(line: bytes) -> dict[str, Any] | None:
    """The JSON object of one line of a stream; None for the other lines.

    Raises:
        LoadFailed: the server tells of an error.
    """
    text = line.strip()
    if not text.startswith(b"data:") or text.endswith(b"[DONE]"):
        return None
    event = json.loads(text.removeprefix(b"data:"))
    if "error" in event:
        raise LoadFailed(f"the server broke off: {str(event['error'])[:300]}")
    return event


def _connect(url: str, timeout: float) -> http.client.HTTPConnection:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise ConfigError(f"{url} is not the address of a server; write http://127.0.0.1:8000")
    return http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=timeout)


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    """The median and the 95th percentile."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return ordered[min(len(ordered) // 2, last)], ordered[min(int(0.95 * len(ordered)), last)]
