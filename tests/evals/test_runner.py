"""The core of an evaluation: interrupted anywhere, it ends as if it had not been."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sambay.errors import ConfigError, DataError
from sambay.evals.calls import Answer, Call, Passage, Score
from sambay.evals.journal import IDENTITY, SAMPLES, Journal
from sambay.evals.result import RESULT, Result, read_result, sha256_of_json, shown
from sambay.evals.runner import Item, Pace, run_suite
from sambay.evals.statistics import (
    Metric,
    average,
    mean,
    mean_of_groups,
    population_deviation,
)


class Parrot:
    """A backend that says the prompt backwards, in an order of its own."""

    def __init__(self, max_context: int | None = None, name: str = "parrot") -> None:
        self.facts: dict[str, Any] = {"name": name, "backend": "parrot"}
        self.max_context = max_context
        self.prefix_id = 0
        self.asked: list[str] = []

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def prompt_length(self, call: Call) -> int:
        return len(self.encode(call.prompt))

    def generate(self, calls: Sequence[Call], on_answer: Callable[[int, Answer], None]) -> None:
        for number in sorted(range(len(calls)), key=lambda one: calls[one].prompt[::-1]):
            self.asked.append(calls[number].prompt)
            on_answer(number, Answer(calls[number].prompt[::-1], 3, "stop"))

    def score(self, passages: Sequence[Passage], on_score: Callable[[int, Score], None]) -> None:
        raise AssertionError("nothing here is scored")


@dataclass(frozen=True)
class Mirrors:
    """Whether a text reads the same backwards; every second one does."""

    count: int = 40
    name: str = "mirrors"
    settings: dict[str, Any] = field(default_factory=lambda: {"kind": "mirror", "texts": [1, 2]})

    def items(self) -> list[Item]:
        texts = [f"猫{number:03}" for number in range(self.count)]
        texts = [text + text[::-1] if place % 2 else text for place, text in enumerate(texts)]
        return [Item(f"q{n}", Call(text, 4), {"text": text}) for n, text in enumerate(texts)]

    def judge(self, item: Item, answer: Answer) -> dict[str, Any]:
        return {"correct": answer.text == item.gold["text"], "odd\u2028": "line\r\n\x85"}

    def summarise(
        self, items: Sequence[Item], records: Mapping[str, Mapping[str, Any]]
    ) -> tuple[dict[str, Metric], dict[str, Any]]:
        accuracy = mean([float(records[item.key]["correct"]) for item in items])
        return {"accuracy": accuracy}, {"texts": [records[item.key]["text"] for item in items]}


class Stop(Exception):
    """An interruption."""


def interrupted_after(count: int) -> Callable[[int, int, str], None]:
    """A progress that interrupts once that many more are answered."""
    left = [count + 1]  # the state is also told at the start

    def on_progress(done: int, total: int, facts: str, /) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Stop

    return on_progress


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The result.json of an evaluation that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    result = run_suite(Mirrors(), Parrot(), out)
    assert result.metrics["accuracy"] == Metric(0.5, pytest.approx(math.sqrt(0.25 / 39)), 40)
    assert read_result(out).metrics == result.metrics
    return (out / RESULT).read_bytes()


def test_interrupted_at_random_points_the_result_is_the_same_to_the_byte(
    whole: bytes, tmp_path: Path
) -> None:
    drawn = random.Random(4)
    for round in range(8):
        out = tmp_path / str(round)
        asked: list[str] = []
        while not (out / RESULT).exists():
            backend = Parrot()
            with contextlib.suppress(Stop):
                run_suite(
                    Mirrors(), backend, out, on_progress=interrupted_after(drawn.randint(0, 25))
                )
            asked += backend.asked
        assert (out / RESULT).read_bytes() == whole
        assert len(set(asked)) == 40
        # The one that was being told at an interruption was kept before.
        assert len(asked) == 40


def test_a_killed_process_loses_no_answer(whole: bytes, tmp_path: Path) -> None:
    for count in (0, 1, 23):

        def die(done: int, total: int, facts: str, /, limit: int = count) -> None:
            if done == limit:
                os.kill(os.getpid(), signal.SIGKILL)

        out = tmp_path / str(count)
        child = os.fork()
        if child == 0:
            try:
                run_suite(Mirrors(), Parrot(), out, on_progress=die)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        assert not (out / RESULT).exists()
        assert len((out / SAMPLES).read_bytes().splitlines()) == count
        backend = Parrot()
        run_suite(Mirrors(), backend, out)
        assert len(backend.asked) == 40 - count
        assert (out / RESULT).read_bytes() == whole


def test_a_torn_last_line_is_asked_again(whole: bytes, tmp_path: Path) -> None:
    run_suite(Mirrors(), Parrot(), tmp_path)
    samples = tmp_path / SAMPLES
    content = samples.read_bytes()
    last = content[:-1].rfind(b"\n") + 1
    for length in (last + 1, last + 7, len(content) - 1):  # also in the middle of a character
        samples.write_bytes(content[:length])
        (tmp_path / RESULT).unlink()
        backend = Parrot()
        run_suite(Mirrors(), backend, tmp_path)
        assert len(backend.asked) == 1
        assert samples.read_bytes() == content
        assert (tmp_path / RESULT).read_bytes() == whole


def test_a_finished_evaluation_asks_nothing(whole: bytes, tmp_path: Path) -> None:
    run_suite(Mirrors(), Parrot(), tmp_path)
    backend = Parrot()
    run_suite(Mirrors(), backend, tmp_path)
    assert backend.asked == []
    assert (tmp_path / RESULT).read_bytes() == whole


def test_other_settings_are_refused_by_field(tmp_path: Path) -> None:
    run_suite(Mirrors(), Parrot(), tmp_path)
    before = (tmp_path / SAMPLES).read_bytes()
    for suite, backend, message in (
        (Mirrors(settings={"kind": "glass", "texts": [1, 2]}), Parrot(), "settings.kind was 'mirr"),
        (
            Mirrors(settings={"kind": "mirror", "texts": [1]}),
            Parrot(),
            r"settings.texts was \[1, 2",
        ),
        (Mirrors(settings={"kind": "mirror"}), Parrot(), "only that one has settings.texts"),
        (Mirrors(41), Parrot(), "items_sha256 was "),
        (Mirrors(name="others"), Parrot(), "suite was 'mirrors', now 'others'"),
        (Mirrors(), Parrot(name="crow"), "model.name was 'parrot', now 'crow'"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_suite(suite, backend, tmp_path)
        assert backend.asked == []
    assert (tmp_path / SAMPLES).read_bytes() == before


def test_two_processes_at_once_are_refused(tmp_path: Path) -> None:
    with Journal(tmp_path, {"suite": "x"}):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                Journal(tmp_path, {"suite": "x"}).__enter__()
            except ConfigError as error:
                code = 0 if "is in use by another evaluation" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
    with Journal(tmp_path, {"suite": "x"}) as journal:
        assert journal.records == {}


def test_a_damaged_line_and_samples_of_nobody_knows_what_are_refused(tmp_path: Path) -> None:
    run_suite(Mirrors(), Parrot(), tmp_path)
    samples = tmp_path / SAMPLES
    lines = samples.read_bytes().splitlines(keepends=True)
    samples.write_bytes(lines[0] + b'{"no key": 1}\n' + lines[2])
    with pytest.raises(DataError, match="line 2 is damaged"):
        run_suite(Mirrors(), Parrot(), tmp_path)
    (tmp_path / IDENTITY).write_text("{")
    with pytest.raises(DataError, match=f"{IDENTITY} cannot be read"):
        run_suite(Mirrors(), Parrot(), tmp_path)
    (tmp_path / IDENTITY).unlink()
    with pytest.raises(DataError, match=f"has no {IDENTITY} beside it"):
        run_suite(Mirrors(), Parrot(), tmp_path)


def test_questions_that_do_not_fit_and_none_at_all_are_refused(tmp_path: Path) -> None:
    """The longest has 12 tokens and takes 4 more."""
    backend = Parrot(max_context=15)
    with pytest.raises(ConfigError, match=r"question q1 has 12 tokens and may take 4 more, .* 15;"):
        run_suite(Mirrors(), backend, tmp_path / "a")
    with pytest.raises(ConfigError, match="suite 'mirrors' has no questions"):
        run_suite(Mirrors(0), backend, tmp_path / "a")
    assert backend.asked == []
    assert not (tmp_path / "a").exists()
    run_suite(Mirrors(), Parrot(max_context=16), tmp_path / "a")


def test_a_folder_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to .*; choose another --out"):
        run_suite(Mirrors(), Parrot(), tmp_path / "file" / "out")


def test_progress_counts_what_was_answered_before() -> None:
    told: list[tuple[int, int, str]] = []
    times = iter([0.0, 1.0, 2.0, 4.0, 8.0])
    pace = Pace(10, 4, lambda *facts: told.append(facts), clock=lambda: next(times))
    pace.show()
    pace.advance(True)
    pace.advance(False)
    pace.advance(None)
    assert told == [
        (4, 10, ""),
        (5, 10, "0.5 answers/s  0:10 left  100.0% right"),
        (6, 10, "0.5 answers/s  0:08 left  50.0% right"),
        (7, 10, "0.375 answers/s  0:08 left  50.0% right"),
    ]


def test_a_result_survives_its_file_and_another_version_is_refused(tmp_path: Path) -> None:
    result = Result("s", {"a": [1, None]}, "00", {"name": "m"}, {"x": mean([1.0])}, {"d": {}})
    path = result.write(tmp_path)
    again = read_result(path)
    assert (again.metrics, again.settings, again.details) == (
        result.metrics, result.settings, result.details,
    )  # fmt: skip
    assert again.command
    assert "torch" in again.versions
    assert again.write(tmp_path / "copy").read_bytes() == path.read_bytes()
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"format_version": 2}))
    with pytest.raises(DataError, match="format_version = 2"):
        read_result(tmp_path)
    path.write_text("[]")
    with pytest.raises(DataError, match="is not the result of an evaluation"):
        read_result(path)
    with pytest.raises(DataError, match="does not exist"):
        read_result(tmp_path / "none.json")


def test_fingerprints_ignore_the_order_of_keys_only() -> None:
    assert sha256_of_json({"a": 1, "b": [2, "\ud800"]}) == sha256_of_json(
        {"b": [2, "\ud800"], "a": 1}
    )
    assert sha256_of_json({"a": [1, 2]}) != sha256_of_json({"a": [2, 1]})


# By hand: 3 of 4 right has the sample variance 0.25.
def test_means_and_their_errors() -> None:
    assert mean([1, 0, 1, 1]) == Metric(0.75, 0.25, 4)
    assert mean([2.5]) == Metric(2.5, None, 1)
    assert mean([0.1] * 10) == Metric(0.1, 0.0, 10)
    grouped = mean_of_groups({"a": [1, 0], "b": [1, 1, 1, 1], "c": [0]})
    assert grouped == Metric(0.5, pytest.approx(0.5 / math.sqrt(3)), 3)
    assert average([Metric(0.2, 0.03, 5), Metric(0.6, 0.04, 7)]) == Metric(
        pytest.approx(0.4), pytest.approx(0.025), 12
    )
    assert average([Metric(0.2, 0.03, 5), Metric(0.6, None, 1)]).stderr is None
    assert population_deviation([2, 4, 4, 4, 5, 5, 7, 9]) == 2.0
    assert shown({"a": Metric(0.5, 0.25, 4), "long@32": Metric(2.0, None, 1)}) == [
        "a        0.5000 +- 0.2500  (n = 4)",
        "long@32  2.0000  (n = 1)",
    ]
