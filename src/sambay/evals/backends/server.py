"""An OpenAI-compatible server as a backend: vLLM, llama.cpp, `python -m sambay.hf serve`."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sambay.errors import ConfigError, nearest
from sambay.evals.backends.json_client import JsonClient, ServerError
from sambay.evals.backends.prompts import Prompts
from sambay.evals.calls import Answer, Call, Passage, Score
from sambay.generate.requests import FinishReason
from sambay.generate.stopping import StopMatcher

REQUESTS = 16
"""Requests on their way at once where no number is given; the server makes batches of them."""

_T = TypeVar("_T")


class ServerBackend:
    """A backend (`sambay.evals.calls.Backend`) that asks a server.

    model: its name there.
    prompts: the text side of the model, if its tokenizer is at hand; plain prompts are then sent
        as token ids, lengths are known, and passages can be scored. Else prompts are sent as text
        and the server reads them as it does.
    requests: how many at once.
    max_context: None takes what the server says, where prompts can be measured.

    Raises:
        ServerError: no such server or model there.
    """

    def __init__(
        self,
        client: JsonClient,
        model: str,
        prompts: Prompts | None = None,
        *,
        requests: int | None = None,
        max_context: int | None = None,
    ) -> None:
        self._client = client
        self._model = model
        self._prompts = prompts
        self._requests = requests or REQUESTS
        reported = self._reported()
        self.max_context: int | None = None
        if prompts is not None:
            limit = reported.get("max_model_len")
            known = limit if isinstance(limit, int) and limit > 0 else prompts.max_context
            self.max_context = known if max_context is None else max_context
        elif max_context is not None:
            raise ConfigError(
                "--max-context needs --tokenizer with --backend server, to measure prompts; the "
                "server itself refuses those that are too long"
            )
        self.prefix_id = -1 if prompts is None else prompts.prefix_id
        self.facts = {
            "name": model.rstrip("/").rpartition("/")[2],
            "backend": "server",
            "model": model,
            "reported": reported,
            **({} if prompts is None else prompts.facts),
        }

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing added.

        Raises:
            ConfigError: no tokenizer was given.
        """
        return self._required_prompts("this suite").tokenizer.encode(text)

    def prompt_length(self, call: Call) -> int:
        """The tokens of a call's prompt, chat template included; raises as `encode`."""
        return len(self._required_prompts("measuring prompts").ids(call))

    def generate(self, calls: Sequence[Call], on_answer: Callable[[int, Answer], None]) -> None:
        """Answer every call, in the order in which the server does.

        Raises:
            ServerError: the server refuses one, or does not come back.
        """
        for call in calls:
            StopMatcher(call.stop)  # which refuses empty ones before anything is asked
        self._in_parallel(lambda number: self._answer(calls[number]), len(calls), on_answer)

    def score(self, passages: Sequence[Passage], on_score: Callable[[int, Score], None]) -> None:
        """Score every passage.

        Raises:
            ConfigError: no tokenizer was given, or a passage that cannot be scored.
            ServerError: the server does not give the log-probabilities of prompts.
        """
        self._required_prompts("scoring passages")
        for number, passage in enumerate(passages):
            length = len(passage.context) + len(passage.continuation)
            if not passage.context or not passage.continuation:
                raise ConfigError(f"passage {number} has no context or no continuation")
            if self.max_context is not None and length >= self.max_context:
                raise ConfigError(
                    f"passage {number} has {length} tokens and takes one more to score, the "
                    f"server's context is {self.max_context}; ask for less"
                )
        self._in_parallel(lambda number: self._score(passages[number]), len(passages), on_score)

    def _reported(self) -> dict[str, Any]:
        """What /v1/models says of the model, without times.

        Raises:
            ServerError: it is not there.
        """
        listed = self._client.get("/v1/models").get("data")
        entries = [entry for entry in listed or () if isinstance(entry, dict)]
        for entry in entries:
            if entry.get("id") == self._model:
                kept = ("id", "root", "owned_by", "max_model_len")
                return {name: entry[name] for name in kept if entry.get(name) is not None}
        # transformers lists the models of its cache only, but takes the path of any folder.
        try:
            self._ask("/v1/completions", {"prompt": "a", "max_tokens": 1, "temperature": 0.0})
        except ServerError as error:
            names = [str(entry.get("id")) for entry in entries]
            hint = nearest(self._model, names) if names else ""
            raise ServerError(f"the server has no model '{self._model}'{hint}; {error}") from error
        return {}

    def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The first choice of an answer, with its `usage`."""
        values = self._client.post(path, {"model": self._model, **body})
        try:
            return {**values["choices"][0], "usage": values.get("usage")}
        except (KeyError, IndexError, TypeError) as error:
            raise ServerError(
                f"{self._client.url}{path} answers without choices: {str(values)[:200]}"
            ) from error

    def _answer(self, call: Call) -> Answer:
        sampling = call.sampling
        body: dict[str, Any] = {
            "max_tokens": call.max_new_tokens,
            "temperature": float(sampling.temperature),
            "top_p": float(sampling.top_p),
            # Servers keep seeds in 31 or 32 bits.
            "seed": sampling.seed % 2**31,
        }
        # Not every server knows these, so only what is asked for is sent.
        if call.stop:
            body["stop"] = list(call.stop)
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        if sampling.repetition_penalty != 1:
            body["repetition_penalty"] = sampling.repetition_penalty
        if call.chat:
            path = "/v1/chat/completions"
            choice = self._ask(
                path, body | {"messages": [{"role": "user", "content": call.prompt}]}
            )
            message = choice.get("message")
            text = message.get("content") if isinstance(message, dict) else None
            reasoning = message.get("reasoning_content") if isinstance(message, dict) else None
            if isinstance(reasoning, str):  # some servers take the thinking out of the answer
                text = f"<think>{reasoning}</think>{text or ''}"
        else:
            path = "/v1/completions"
            prompt = call.prompt if self._prompts is None else self._prompts.ids(call).tolist()
            choice = self._ask(path, body | {"prompt": prompt})
            text = choice.get("text")
        if not isinstance(text, str):
            raise ServerError(f"{self._client.url}{path} answers without text: {str(choice)[:200]}")
        return self._checked(call, text, choice)

    def _checked(self, call: Call, text: str, choice: dict[str, Any]) -> Answer:
        """The answer, which may have been given with its stop string."""
        matcher = StopMatcher(call.stop)
        text = matcher.push(text) + matcher.finish()
        stopped = matcher.matched is not None or choice.get("finish_reason") != "length"
        reason: FinishReason = "stop" if stopped else "length"
        usage = choice["usage"]
        count = usage.get("completion_tokens") if isinstance(usage, dict) else None
        if not isinstance(count, int):
            if self._prompts is None:
                raise ServerError(
                    f"{self._client.url} does not say how many tokens an answer has (usage); give "
                    "--tokenizer to count them here"
                )
            count = len(self._prompts.tokenizer.encode(text)) + (reason == "stop")
        return Answer(text, count, reason)

    def _score(self, passage: Passage) -> Score:
        path = "/v1/completions"
        body = {
            "prompt": [*passage.context, *passage.continuation],
            "max_tokens": 1,
            "temperature": 0.0,
            "echo": True,
            "logprobs": 1,
        }
        values = self._ask(path, body).get("logprobs")
        begin, end = len(passage.context), len(passage.context) + len(passage.continuation)
        try:
            logprobs = [float(value) for value in values["token_logprobs"][begin:end]]  # pyright: ignore
            best = [max(top.values()) for top in values["top_logprobs"][begin:end]]  # pyright: ignore
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._without_logprobs(path) from error
        if len(logprobs) != len(passage.continuation) or len(best) != len(logprobs):
            raise self._without_logprobs(path)
        is_greedy = all(one >= top for one, top in zip(logprobs, best, strict=True))
        return Score(math.fsum(logprobs), is_greedy)

    def _without_logprobs(self, path: str) -> ServerError:
        return ServerError(
            f"{self._client.url}{path} does not give the log-probabilities of a prompt (echo, "
            "logprobs); score with --backend engine or transformers, or a server that does (vLLM)"
        )

    def _required_prompts(self, what: str) -> Prompts:
        if self._prompts is None:
            raise ConfigError(f"{what} needs token ids; give --tokenizer with --backend server")
        return self._prompts

    def _in_parallel(
        self, ask: Callable[[int], _T], count: int, on_done: Callable[[int, _T], None]
    ) -> None:
        """Ask for every number from 0, a few at once; tell the results in this thread.

        Threads that wait for the server do not keep the process alive after an interruption.
        """
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, _T | Exception]] = queue.SimpleQueue()
        over = threading.Event()
        for number in range(count):
            waiting.put(number)

        def work() -> None:
            while not over.is_set():
                try:
                    number = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((number, ask(number)))
                except Exception as error:  # noqa: BLE001, whatever it is, the asker must hear of it
                    done.put((number, error))

        for _ in range(min(self._requests, count)):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in range(count):
                number, result = done.get()
                if isinstance(result, ServerError):
                    raise ServerError(f"question {number + 1} of {count}: {result}") from result
                if isinstance(result, Exception):
                    raise result
                on_done(number, result)
        finally:
            over.set()
