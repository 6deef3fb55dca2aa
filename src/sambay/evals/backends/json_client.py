"""JSON over HTTP with the standard library: retries, and errors in the server's own words."""

from __future__ import annotations

import http.client
import ipaddress
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from sambay.errors import ConfigError, SambayError

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds before each new attempt at what failed for a reason that may pass."""

FIRST_WAITS = 2
"""So many of them for what only reads, which comes first: a wrong address should not take long."""

_MAY_PASS = (408, 425, 429, 500, 502, 503, 504)


class ServerError(SambayError):
    """A server that cannot be reached, refuses, or answers with something else than agreed."""


class JsonClient:
    """Calls of one server.

    url: with or without the "/v1" at its end.
    waits: seconds before each new attempt; as many attempts as there are waits, and one.

    Raises:
        ConfigError: not the address of a server.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 3600.0,
        waits: Sequence[float] = WAITS,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"--url {url} is not the address of a server; write http://127.0.0.1:8000"
            )
        self.url = url.rstrip("/").removesuffix("/v1")
        self._timeout, self._waits, self._sleep = timeout, tuple(waits), sleep
        # A proxy of the environment cannot know what runs on this machine.
        handlers = [urllib.request.ProxyHandler({})] if _is_loopback(parts.hostname) else []
        self._opener = urllib.request.build_opener(*handlers)

    def get(self, path: str) -> dict[str, Any]:
        """The answer to GET; raises as `post`."""
        return self._call(path, None, self._waits[:FIRST_WAITS])

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to POST, a JSON object.

        Raises:
            ServerError: refused (4xx, with the server's words), still failing after all attempts,
                or no JSON object.
        """
        return self._call(path, json.dumps(body).encode(), self._waits)

    def _call(self, path: str, body: bytes | None, waits: Sequence[float]) -> dict[str, Any]:
        address = self.url + path
        for wait in (*waits, None):
            request = urllib.request.Request(
                address, body, {"Content-Type": "application/json", "Accept": "application/json"}
            )
            after: str | None = None
            try:
                with self._opener.open(request, timeout=self._timeout) as response:
                    return _parsed(response.read(), address)
            except urllib.error.HTTPError as error:
                words = _words(error)
                if error.code not in _MAY_PASS:
                    raise ServerError(f"{address} refuses ({error.code}): {words}") from error
                reason = f"fails ({error.code}): {words}"
                after = error.headers.get("Retry-After")
            except (OSError, http.client.HTTPException) as error:
                cause = getattr(error, "reason", error)
                reason = f"cannot be reached ({cause or type(error).__name__})"
            if wait is not None:
                self._sleep(min(float(after), 60.0) if after and after.isdigit() else wait)
        attempts = len(waits) + 1
        raise ServerError(
            f"{address} {reason}; gave up after {attempts} attempts, check the server and run the "
            "command again"
        )


def _parsed(content: bytes, address: str) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except ValueError as error:
        raise ServerError(
            f"{address} answers with no JSON ({content[:80]!r}); check that --url is that of an "
            "OpenAI-compatible server"
        ) from error
    if not isinstance(values, dict):
        raise ServerError(f"{address} answers with {str(values)[:80]}, not with a JSON object")
    return values


def _words(error: urllib.error.HTTPError) -> str:
    """What the server says is wrong, in one line."""
    try:
        text = error.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return str(error.reason)
    try:
        values = json.loads(text)
    except ValueError:
        values = text
    # OpenAI's {"error": {"message": ...}}, vLLM's {"message": ...}, FastAPI's {"detail": ...}.
    for name in ("error", "message", "detail"):
        if isinstance(values, dict) and values.get(name):
            values = values[name]
    return " ".join(str(values).split())[:300] or str(error.reason)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
