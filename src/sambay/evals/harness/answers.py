"""Answers of a backend to the requests of lm-eval, each kept under a fingerprint of its request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from sambay.evals.calls import Answer, Backend, Call, Passage, Score
from sambay.evals.harness.questions import (
    DEFAULT_WINDOW,
    Reading,
    check_call,
    check_passages,
    is_drawn,
    to_call,
)
from sambay.evals.result import sha256_of_json
from sambay.evals.runner import Pace, Progress
from sambay.generate.sampling import sample_seed

PAIR, ROLLING, GENERATE = "loglikelihood", "loglikelihood_rolling", "generate_until"


class Records(Protocol):
    """Where answers are kept, such as a `Journal`."""

    records: dict[str, dict[str, Any]]

    def add(self, key: str, record: Mapping[str, Any], /) -> None:
        """Keep the record of a key that was not known."""
        ...


class InMemory:
    """Answers of one process, kept nowhere else."""

    def __init__(self) -> None:
        self.records: dict[str, dict[str, Any]] = {}

    def add(self, key: str, record: Mapping[str, Any], /) -> None:
        """Keep a record."""
        self.records[key] = dict(record)


@dataclass(frozen=True)
class Question:
    """A request as what is asked of the backend, by keys that name the request alone.

    where: the task and document, for messages and to find answers in the samples.
    """

    kind: str
    where: dict[str, Any]
    passages: dict[str, Passage] = field(default_factory=dict)
    calls: dict[str, Call] = field(default_factory=dict)

    @property
    def place(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.where.items())

    @property
    def keys(self) -> list[str]:
        return [*self.passages, *self.calls]


class Answers:
    """Answers requests with a backend (the `Answerer` of `harness.library`).

    A request that occurs twice is answered once, unless its answer is drawn by chance.

    records: what is known already, and where answers are kept.
    window: most tokens that a text whose perplexity is asked for is read by at once.
    bos: put the backend's prefix token in front of every text that is scored.
    seed: of continuations that a task wants drawn by chance.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        records: Records | None = None,
        window: int = DEFAULT_WINDOW,
        bos: bool = False,
        seed: int = 0,
    ) -> None:
        self._backend = backend
        self.records: Records = InMemory() if records is None else records
        self._reading = Reading(backend.encode, backend.prefix_id, bos, window)
        self._seed = seed
        self._made: dict[str, Question] = {}

    def __call__(self, kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The answers in lm-eval's form, after asking the backend what is not known.

        Raises:
            SambayError: a request that does not fit the model's context, or cannot be answered.
        """
        places = [{"request": number} for number in range(len(arguments))]
        questions = self.questions(kind, arguments, places)
        self.ask(questions)
        return [self._answer(question) for question in questions]

    def questions(
        self,
        kind: str,
        arguments: Sequence[tuple[Any, ...]],
        places: Sequence[dict[str, Any]],
    ) -> list[Question]:
        """The questions that requests mean; all are checked.

        Raises:
            ConfigError: one does not fit the model's context (names it and the lengths), or has
                options that cannot work.
            DataError: one has nothing to score.
        """
        seen: Counter[str] = Counter()
        found = []
        for parts, place in zip(arguments, places, strict=True):
            key = sha256_of_json([kind, *parts])[:32]
            # Only what is drawn by chance is asked again when it occurs again.
            name = f"{key}/{seen[key]}" if kind == GENERATE and is_drawn(parts[1]) else key
            # lm-eval asks for what was checked before, and long prompts take time to encode.
            if name not in self._made:
                seed = sample_seed(self._seed, seen[key])
                self._made[name] = self._question(kind, name, parts, seed, place)
            seen[key] += 1
            found.append(self._made[name])
        return found

    def ask(self, questions: Sequence[Question], on_progress: Progress | None = None) -> None:
        """Ask the backend what is not known yet, and keep it.

        Raises:
            SambayError: what the backend raises; what was answered before is kept.
        """
        places = {key: question.where for question in questions for key in question.keys}
        known = self.records.records
        pace = Pace(len(places), len(places.keys() & known.keys()), on_progress)
        pace.show()
        passages = {
            key: passage
            for question in questions
            for key, passage in question.passages.items()
            if key not in known
        }
        calls = {
            key: call
            for question in questions
            for key, call in question.calls.items()
            if key not in known
        }

        def keep(keys: list[str], index: int, given: Score | Answer) -> None:
            key = keys[index]
            self.records.add(key, {**places[key], **asdict(given)})
            pace.advance(None)

        if passages:
            to_score = list(passages)
            self._backend.score(list(passages.values()), lambda i, x: keep(to_score, i, x))
        if calls:
            to_answer = list(calls)
            self._backend.generate(list(calls.values()), lambda i, x: keep(to_answer, i, x))

    def _question(
        self, kind: str, key: str, parts: tuple[Any, ...], seed: int, place: dict[str, Any]
    ) -> Question:
        question = Question(kind, place)
        limit = self._backend.max_context
        if kind == GENERATE:
            prompt, options = parts
            call = to_call(prompt, options, seed, question.place)
            length = self._backend.prompt_length(call) if limit is not None else 0
            check_call(length, call.max_new_tokens, limit, question.place)
            question.calls[key] = call
            return question
        if kind == PAIR:
            context, continuation = parts
            question.passages[key] = self._reading.pair(context, continuation, question.place)
        else:
            windows = enumerate(self._reading.windows(parts[0]))
            question.passages.update({f"{key}/{number}": passage for number, passage in windows})
        check_passages(list(question.passages.values()), limit, question.place)
        return question

    def _answer(self, question: Question) -> Any:
        records = [self.records.records[key] for key in question.keys]
        if question.kind == ROLLING:
            return sum(record["logprob"] for record in records)
        if question.kind == PAIR:
            return records[0]["logprob"], records[0]["is_greedy"]
        return records[0]["text"]
