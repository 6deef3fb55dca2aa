"""Asks a model the questions of a suite that are not answered yet, and writes the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sambay.errors import ConfigError
from sambay.evals.calls import Answer, Backend, Call
from sambay.evals.journal import Journal
from sambay.evals.result import Result, sha256_of_json
from sambay.evals.statistics import Metric
from sambay.train.display import duration


@dataclass(frozen=True)
class Item:
    """One question: what is asked, and what the suite needs to judge the answer (JSON-ready).

    `key` names it within the suite, and stays the same when there are more questions.
    """

    key: str
    call: Call
    gold: dict[str, Any] = field(default_factory=dict)


class Suite(Protocol):
    """Questions that are answered by generating text.

    settings: JSON-ready; all that decides what is asked and what counts as right.
    """

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> dict[str, Any]: ...

    def items(self) -> Sequence[Item]:
        """The questions, always the same.

        Raises:
            SambayError: data that is missing or damaged.
        """
        ...

    def judge(self, item: Item, answer: Answer) -> dict[str, Any]:
        """What is kept of an answer besides its text: at least `correct`."""
        ...

    def summarise(
        self, items: Sequence[Item], records: Mapping[str, Mapping[str, Any]]
    ) -> tuple[dict[str, Metric], dict[str, Any]]:
        """The metrics and details of all answers, by the keys of the items."""
        ...


class Progress(Protocol):
    """Told how far it is."""

    def __call__(self, done: int, total: int, facts: str, /) -> None: ...


def run_suite(
    suite: Suite, backend: Backend, out: Path, *, on_progress: Progress | None = None
) -> Result:
    """The result, after answering what OUT does not hold yet; written to OUT/result.json.

    Everything that can be wrong with the questions is said before any is asked. May be interrupted
    at any time and called again.

    Raises:
        ConfigError: no questions, questions that do not fit the model's context (nothing is ever
            cut), or OUT holds another evaluation.
        SambayError: what the suite or the backend raise.
    """
    items = suite.items()
    if not items:
        raise ConfigError(f"suite '{suite.name}' has no questions; check its settings and data")
    keys = {item.key for item in items}
    assert len(keys) == len(items), "two questions share a key"
    check_context(items, backend)
    digest = sha256_of_json([{**asdict(item)} for item in items])
    identity = {
        "suite": suite.name,
        "settings": suite.settings,
        "items_sha256": digest,
        "model": backend.facts,
    }
    with Journal(out, identity) as journal:
        _answer(suite, backend, items, journal, on_progress)
        records = {item.key: journal.records[item.key] for item in items}
        metrics, details = suite.summarise(items, records)
        result = Result(suite.name, suite.settings, digest, backend.facts, metrics, details)
        result.write(out)
    return result


def check_context(items: Sequence[Item], backend: Backend) -> None:
    """Make sure that every prompt and its longest answer fit the model's context.

    Raises:
        ConfigError: names the first that does not, its length and the limit.
    """
    if backend.max_context is None:
        return
    for item in items:
        prompt = backend.prompt_length(item.call)
        if prompt + item.call.max_new_tokens > backend.max_context:
            raise ConfigError(
                f"question {item.key} has {prompt} tokens and may take {item.call.max_new_tokens} "
                f"more, the model's context is {backend.max_context}; ask for less, or raise the "
                "limit with --max-context if the model can take it"
            )


def _answer(
    suite: Suite,
    backend: Backend,
    items: Sequence[Item],
    journal: Journal,
    on_progress: Progress | None,
) -> None:
    missing = [item for item in items if item.key not in journal.records]
    pace = Pace(len(items), len(items) - len(missing), on_progress)
    pace.show()

    def keep(index: int, answer: Answer) -> None:
        item = missing[index]
        judged = suite.judge(item, answer)
        assert "correct" in judged, "every answer is right or wrong"
        journal.add(item.key, {"gold": item.gold, **asdict(answer), **judged})
        pace.advance(bool(judged["correct"]))

    if missing:
        backend.generate([item.call for item in missing], keep)


class Pace:
    """Counts answers and says how far it is, how fast, and how much is right so far."""

    def __init__(
        self,
        total: int,
        done: int,
        on_progress: Progress | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._done, self._tell = total, done, on_progress
        self._clock, self._started = clock, clock()
        self._answered = self._judged = self._right = 0

    def advance(self, correct: bool | None) -> None:
        """One more is answered; None where answers are judged together, later."""
        self._done += 1
        self._answered += 1
        self._judged += correct is not None
        self._right += bool(correct)
        self.show()

    def show(self) -> None:
        """Tell the state."""
        if self._tell is None:
            return
        facts = ""
        seconds = self._clock() - self._started
        if self._answered and seconds > 0:
            rate = self._answered / seconds
            left = duration((self._total - self._done) / rate)
            facts = f"{rate:.3g} answers/s  {left} left"
            if self._judged:
                facts += f"  {self._right / self._judged:.1%} right"
        self._tell(self._done, self._total, facts)
