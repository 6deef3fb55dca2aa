"""Chained assignments: the puzzles, what counts as right, and the texts to train on."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sambay.errors import ConfigError
from sambay.evals.calls import Answer, Call, Passage, Score
from sambay.evals.chains import VARIABLES, chain_documents, puzzle
from sambay.evals.suites.chains import ChainsSuite

SUITE = ChainsSuite(steps=(1, 3, 6), lines=12, other_steps=4, prompts=5)


class Solver:
    """Follows the chain of a prompt for at most `most` steps, and then says so or guesses."""

    max_context = None
    prefix_id = 0

    def __init__(self, most: int, last: str = ".") -> None:
        self.most, self.last = most, last
        self.facts: dict[str, Any] = {"name": f"solver-{most}"}

    def generate(self, calls: Sequence[Call], on_answer: Callable[[int, Answer], None]) -> None:
        for index, call in enumerate(calls):
            lines = call.prompt.split("\n")
            values = dict(line.rstrip(".").split("=") for line in lines[: lines.index("")])
            at, way = lines[-1].removesuffix("="), []
            while at in values and len(way) < self.most:
                at = values[at]
                way.append(at)
            on_answer(index, Answer("=".join(way) + self.last, len(way), "stop"))

    def encode(self, text: str) -> list[int]:
        return [*text.encode()]

    def prompt_length(self, call: Call) -> int:
        return len(call.prompt)

    def score(self, passages: Sequence[Passage], on_score: Callable[[int, Score], None]) -> None:
        raise AssertionError("nothing to score")


def test_a_solver_that_follows_every_chain_is_right(tmp_path: Path) -> None:
    result = SUITE.evaluate(Solver(99), tmp_path)
    assert {name: metric.value for name, metric in result.metrics.items()} == dict.fromkeys(
        [
            f"{kind}@{steps}"
            for kind in ("accuracy", "followed", "final_accuracy")
            for steps in (1, 3, 6)
        ],
        1.0,
    )


def test_a_solver_that_does_not_stop_has_followed_the_chain_all_the_same(tmp_path: Path) -> None:
    result = SUITE.evaluate(Solver(99, last="=ba."), tmp_path)
    for steps in (1, 3, 6):
        assert result.metrics[f"accuracy@{steps}"].value == 0
        assert result.metrics[f"followed@{steps}"].value == 1
        assert result.metrics[f"final_accuracy@{steps}"].value == 0


def test_a_solver_that_tires_is_right_on_short_chains_only(tmp_path: Path) -> None:
    result = SUITE.evaluate(Solver(3), tmp_path)
    values = [result.metrics[f"accuracy@{steps}"].value for steps in (1, 3, 6)]
    assert values == [1.0, 1.0, 0.0]
    assert [point["mean_steps_followed"] for point in result.details["curve"]] == [1, 3, 3]


@pytest.mark.parametrize(
    ("text", "correct", "final", "followed"),
    [
        ("b1=c2=d3.", True, True, 3),
        ("b1=c2=d3.\nand more", True, True, 3),
        ("b1=c2=d3", False, True, 3),  # it did not say that the chain ends
        ("b1=d3.", False, True, 1),  # a step left out
        ("b1=c2=d3=e4.", False, False, 3),
        ("b1=c9=d3.", False, True, 1),
        ("", False, False, 0),
        ("\nb1=c2=d3.", False, False, 0),
    ],
)
def test_only_the_whole_chain_counts(text: str, correct: bool, final: bool, followed: int) -> None:
    item = SUITE.items()[0]
    item.gold["chain"] = ["a0", "b1", "c2", "d3"]
    judged = SUITE.judge(item, Answer(text, 9, "stop"))
    assert judged == {
        "correct": correct, "final_is_right": final, "steps_followed": followed,
    }  # fmt: skip


def test_puzzles_are_the_same_every_time_and_chains_never_meet() -> None:
    made = puzzle(random.Random(3), [4, 1, 2])
    assert made == puzzle(random.Random(3), [4, 1, 2])
    assert sorted(map(len, made.chains)) == [2, 3, 5]
    used = [name for chain in made.chains for name in chain]
    assert len(set(used)) == len(used)
    assert len(made.lines) == 7
    marked = {line.removesuffix(".").split("=")[1] for line in made.lines if line.endswith(".")}
    assert marked == {chain[-1] for chain in made.chains}
    assert SUITE.items() == SUITE.items()
    prompt = SUITE.items()[0].call.prompt
    lines, _, rest = prompt.partition("\n\n")
    assert len(lines.splitlines()) == 12
    assert rest.count("\n") == 1  # an answered example, and the question
    assert prompt.endswith("=")


def test_texts_to_train_on_hold_answered_questions() -> None:
    texts = list(chain_documents(1, 20, most_lines=20, most_steps=5, most_questions=3))
    assert texts == list(chain_documents(1, 20, most_lines=20, most_steps=5, most_questions=3))
    for text in texts:
        head, _, tail = text.partition("\n\n")
        values = dict(line.rstrip(".").split("=") for line in head.splitlines())
        assert 2 <= len(values) <= 20
        for line in tail.splitlines():
            way = line.removesuffix(".").split("=")
            assert all(values[a] == b for a, b in pairwise(way))
            assert way[-1] not in values, "a chain is followed to its end"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"steps": ()}, "steps = "),
        ({"steps": (0,)}, "at least 1"),
        ({"steps": (2, 2)}, "each number once"),
        ({"steps": (40,)}, "no more steps than"),
        ({"prompts": 0}, "prompts = 0"),
    ],
)
def test_what_cannot_be_asked_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ChainsSuite(**fields)


def test_more_lines_than_variables_are_refused(tmp_path: Path) -> None:
    suite = ChainsSuite(lines=len(VARIABLES), prompts=1)
    with pytest.raises(ConfigError, match="variables"):
        suite.evaluate(Solver(1), tmp_path)
