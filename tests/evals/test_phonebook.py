"""Phonebook asks exactly what was published, scores exactly as published, and reports both."""

from __future__ import annotations

import hashlib
import importlib.util
import random
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sambay.errors import ConfigError, MissingPackage
from sambay.evals.calls import Answer, Call, Passage, Score
from sambay.evals.phonebook import census
from sambay.evals.phonebook.books import Protocol, Question, Variant, questions
from sambay.evals.phonebook.names import FIRST_NAMES, LAST_NAMES, MOST_NAMES, unique_names
from sambay.evals.result import read_result
from sambay.evals.suites.phonebook import PhonebookSuite

needs_names = pytest.mark.skipif(
    importlib.util.find_spec("names") is None, reason="the package 'names' is not installed"
)
SMALL = {"pairs": (12,), "groups": 2, "batches": 2, "prompts": 3}

# What a change of lists, draws or format would change: every prompt ever asked.
FIRST_UNIQUE = """\
Jessica Davis: 7388820979
Thomas Macdonald: 6788530318
Alicia James: 9850628303
Francis Whitaker: 7076513565
Sidney Pitts: 6144233344

Sidney Pitts: 6144233344
Alicia James: 9850628303

Francis Whitaker:"""
FIRST_PUBLISHED = """\
Robert Ford: 8828857949
Adam Jentzsch: 6405762472
Christen Williams: 7927769026
Anthony Mathews: 9793688514
Anthony Chien: 6537941895

Anthony Chien: 6537941895
Robert Ford: 8828857949

Christen Williams:"""
GOLDEN = {
    Variant.UNIQUE: "ada25757418b521aefe8d04f37b063b114a140a2a573792a1ecc53fedb337e31",
    Variant.PUBLISHED: "10865417f297d57f9f7032a0df4d525117a04ed80b3b6f9a9ec7ced98336f234",
}


class Stub:
    """Answers as a function of the prompt, one token for every character of it."""

    def __init__(
        self, say: Callable[[str], str], *, ends: str = "length", max_context: int | None = None
    ) -> None:
        self.facts: dict[str, Any] = {"name": "stub", "window": 16}
        self.max_context = max_context
        self.prefix_id = 0
        self.asked = 0
        self.stop_after: int | None = None
        self._say, self._ends = say, ends

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def prompt_length(self, call: Call) -> int:
        return len(call.prompt)

    def generate(self, calls: Sequence[Call], on_answer: Callable[[int, Answer], None]) -> None:
        for index, call in enumerate(calls):
            if self.asked == self.stop_after:
                raise KeyboardInterrupt
            self.asked += 1
            on_answer(index, Answer(self._say(call.prompt), call.max_new_tokens, self._ends))

    def score(self, passages: Sequence[Passage], on_score: Callable[[int, Score], None]) -> None:
        raise NotImplementedError


def looked_up(prompt: str) -> str:
    """The number that a reader of the prompt finds."""
    name = prompt.rsplit("\n", 1)[1]
    line = next(line for line in prompt.split("\n") if line.startswith(name))
    return line.removeprefix(name).strip()


def evaluated(tmp_path: Path, say: Callable[[str], str], *, ends: str = "length", **options: Any):
    return PhonebookSuite(**(SMALL | options)).evaluate(Stub(say, ends=ends), tmp_path)


def all_questions(pairs: int, variant: Variant = Variant.UNIQUE, **options: Any) -> list[Question]:
    return list(questions(pairs, Protocol(variant, **options)))


def sha256_of(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


# --- what is asked


def test_a_prompt_is_a_book_two_examples_and_a_name() -> None:
    for question in all_questions(9):
        book, examples, asked = question.prompt.split("\n\n")
        entries = book.split("\n")
        assert len(entries) == 9
        assert asked == f"{question.name}:"
        assert entries[question.needle] == f"{question.name}: {question.phone}"
        assert len({*examples.split("\n"), entries[question.needle]} & set(entries)) == 3
        for entry in entries:
            name, phone = entry.split(": ")
            first, last = name.split(" ")
            assert (first in FIRST_NAMES, last in LAST_NAMES) == (True, True)
            assert re.fullmatch("[6-9][0-9]{9}", phone)


def test_prompts_of_unique_names_stay_what_they_are() -> None:
    asked = all_questions(5)
    assert asked[0].prompt == FIRST_UNIQUE
    assert len(asked) == 128
    assert sha256_of(question.prompt for question in asked) == GOLDEN[Variant.UNIQUE]


@needs_names
def test_published_prompts_stay_what_they_are() -> None:
    asked = all_questions(5, Variant.PUBLISHED)
    assert asked[0].prompt == FIRST_PUBLISHED
    assert sha256_of(question.prompt for question in asked) == GOLDEN[Variant.PUBLISHED]


@needs_names
def test_published_prompts_equal_a_derivation_by_the_global_generator() -> None:
    import names

    asked = all_questions(4, Variant.PUBLISHED, groups=2, batches=2, prompts=3)
    state = random.getstate()
    try:
        for group in range(2):
            for batch in range(2):
                random.seed(int("42" + str(group) + "4" + str(batch)))
                for number in range(3):
                    book = []
                    for _ in range(4):
                        name = names.get_full_name()
                        digits = [random.randint(6, 9)]
                        digits += [random.randint(0, 9) for _ in range(9)]
                        book.append(name + ": " + "".join(str(digit) for digit in digits))
                    i, j, k = random.sample(list(range(4)), 3)
                    prompt = "\n".join(book) + f"\n\n{book[i]}\n{book[j]}\n\n"
                    prompt += book[k].split(":")[0] + ":"
                    question = asked.pop(0)
                    assert (question.group, question.batch, question.number) == (
                        group, batch, number,
                    )  # fmt: skip
                    assert question.prompt == prompt
                    assert question.phone == book[k].split(": ")[1]
    finally:
        random.setstate(state)
    assert not asked


@needs_names
@pytest.mark.parametrize("variant", list(Variant))
def test_the_generator_of_the_process_is_left_alone(variant: Variant) -> None:
    state = random.getstate()
    all_questions(5, variant)
    assert random.getstate() == state


@needs_names
def test_a_name_that_occurs_twice_marks_its_question(tmp_path: Path) -> None:
    """The third of these four questions is about one of two people called Timothy Miller."""
    options = {"pairs": (504,), "groups": 1, "batches": 1, "variant": "published"}
    suite = PhonebookSuite(**options)
    (marked,) = (item for item in suite.items() if item.gold["homonyms"])
    gold = marked.gold
    assert (marked.key, gold["name"]) == ("504-0-0-2", "Timothy Miller")
    book = marked.call.prompt.split("\n\n")[0].split("\n")
    numbers = [line.split(": ")[1] for line in book if line.startswith("Timothy Miller:")]
    assert set(numbers) == {gold["phone"], *gold["homonyms"]}
    assert len(numbers) == 2
    other = {marked.call.prompt: gold["homonyms"][0]}
    result = suite.evaluate(Stub(lambda p: other.get(p) or looked_up(p)), tmp_path)
    facts = result.details["lengths"]["504"]
    assert result.metrics["accuracy@504"].value == 0.75
    assert facts["accuracy_of_unambiguous"] == 1.0
    assert facts["ambiguous_questions"] == facts["wrong_but_homonym"] == 1


def test_the_published_variant_says_which_package_it_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    census._table.cache_clear()
    monkeypatch.setitem(sys.modules, "names", None)
    stub = Stub(looked_up)
    with pytest.raises(MissingPackage, match=r"'names'.*sambay\[eval\]"):
        PhonebookSuite(**SMALL, variant="published").evaluate(stub, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_are_unique_in_the_longest_book() -> None:
    (question,) = all_questions(7400, groups=1, batches=1, prompts=1)
    book = question.prompt.split("\n\n")[0].split("\n")
    assert len({entry.split(":")[0] for entry in book}) == 7400
    assert len(set(FIRST_NAMES)) == len(FIRST_NAMES) >= 300
    assert len(set(LAST_NAMES)) == len(LAST_NAMES) >= 500
    assert all(name.isascii() and name.isalpha() for name in FIRST_NAMES + LAST_NAMES)


def test_a_question_does_not_depend_on_how_many_there_are() -> None:
    few = {q.key: q for q in all_questions(6, groups=1, batches=2, prompts=2)}
    many = {q.key: q for q in all_questions(6, groups=3, batches=4, prompts=3)}
    assert few.items() <= many.items()
    assert len({question.prompt for question in many.values()}) == 36


def test_the_instruction_names_whom_to_look_for() -> None:
    plain, told = all_questions(5)[0], all_questions(5, instruction=True)[0]
    assert told.prompt == f"Please find the number of {plain.name}.\n{plain.prompt}"


def test_entries_lie_at_the_depths_asked_for(tmp_path: Path) -> None:
    places = {question.needle for question in all_questions(40, depths=(0, 25, 100))}
    assert places == {0, 10, 39}
    result = evaluated(tmp_path, looked_up, pairs=(40,), depths=[0, 50])
    parts = result.details["lengths"]["40"]["by_depth"]
    assert [(part["from"], part["to"], part["count"]) for part in parts] == [
        (0.0, 0.0, 6), (0.5, 0.5, 6),
    ]  # fmt: skip


# --- what counts


@pytest.mark.parametrize(
    ("said", "accuracy"),
    [
        (looked_up, 1.0),
        (lambda prompt: f"  {looked_up(prompt)} \t\nJohn Smith: 6123456789", 1.0),
        (lambda prompt: f"{looked_up(prompt)}\r\n", 1.0),
        (lambda prompt: "6123456789", 0.0),
        (lambda prompt: "", 0.0),
        (lambda prompt: f"\n{looked_up(prompt)}", 0.0),
        (lambda prompt: f"{looked_up(prompt)}.", 0.0),
        (lambda prompt: f"The number is {looked_up(prompt)}", 0.0),
        (lambda prompt: f"{looked_up(prompt)[:5]} {looked_up(prompt)[5:]}\n", 0.0),
        (lambda prompt: f"{looked_up(prompt)[:9]}\n", 0.0),
        (lambda prompt: f"{looked_up(prompt)}0\n", 0.0),
    ],
)
def test_right_is_the_number_alone_in_the_first_line(
    tmp_path: Path, said: Callable[[str], str], accuracy: float
) -> None:
    result = evaluated(tmp_path, said)
    metric = result.metrics["accuracy@12"]
    assert (metric.value, metric.stderr, metric.count) == (accuracy, 0.0, 12)


def test_the_number_of_a_wrong_name_is_wrong_and_said_to_be_of_the_book(tmp_path: Path) -> None:
    result = evaluated(tmp_path, lambda prompt: prompt.split("\n\n")[1].split(": ")[1][:10])
    facts = result.details["lengths"]["12"]
    assert result.metrics["accuracy@12"].value == 0
    assert facts["wrong"] == facts["wrong_but_in_book"] == 12


@needs_names
def test_the_end_of_the_text_belongs_to_the_line_as_published(tmp_path: Path) -> None:
    """The published scoring decodes the end-of-text token too, and compares it with the number."""
    result = evaluated(tmp_path / "a", looked_up, ends="stop", variant="published")
    assert result.metrics["accuracy@12"].value == 0
    assert result.details["lengths"]["12"]["ends_text"] == 12
    ended = evaluated(
        tmp_path / "b", lambda prompt: f"{looked_up(prompt)}\n", ends="stop", variant="published"
    )
    assert ended.metrics["accuracy@12"].value == 1
    assert evaluated(tmp_path / "c", looked_up, ends="stop").metrics["accuracy@12"].value == 1


def test_accuracy_is_the_mean_of_groups_with_their_deviation(tmp_path: Path) -> None:
    suite = PhonebookSuite(**SMALL)
    right = {item.call.prompt for item in suite.items()[:3]}  # half of the first of two groups
    result = suite.evaluate(Stub(lambda p: looked_up(p) if p in right else "no"), tmp_path)
    metric, facts = result.metrics["accuracy@12"], result.details["lengths"]["12"]
    assert facts["groups"] == [0.5, 0.0]
    assert (metric.value, facts["group_deviation"]) == (0.25, 0.25)
    assert metric.stderr == pytest.approx((0.25 * 0.75 / 12) ** 0.5)


def test_accuracy_by_depth_counts_every_question_once(tmp_path: Path) -> None:
    suite = PhonebookSuite(pairs=(10, 20), groups=2, batches=4, prompts=4, depth_bins=4)

    def early(prompt: str) -> str:
        book = prompt.split("\n\n")[0]
        here = book.index(prompt.rsplit("\n", 1)[1])
        return looked_up(prompt) if book[:here].count("\n") < book.count("\n") / 2 else "?"

    result = suite.evaluate(Stub(early), tmp_path)
    assert set(result.metrics) == {"accuracy@10", "accuracy@20"}
    for facts in result.details["lengths"].values():
        parts = facts["by_depth"]
        assert sum(part["count"] for part in parts) == 32
        assert [part["from"] for part in parts] == [0, 0.25, 0.5, 0.75]
        assert [part["accuracy"] for part in parts] == [1, 1, 0, 0]
    assert result.details["lengths"]["10"]["mean_prompt_tokens"] < 330
    lengths = [len(q.prompt) for q in all_questions(20, groups=2, batches=4)]
    assert result.details["lengths"]["20"]["mean_prompt_tokens"] == sum(lengths) / 32
    assert result.details["lengths"]["20"]["longest_prompt_tokens"] == max(lengths)


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    suite = PhonebookSuite(**SMALL)
    whole = suite.evaluate(Stub(looked_up), tmp_path / "whole")
    stub = Stub(looked_up)
    stub.stop_after = 5
    with pytest.raises(KeyboardInterrupt):
        suite.evaluate(stub, tmp_path / "parts")
    again = Stub(looked_up)
    suite.evaluate(again, tmp_path / "parts")
    assert again.asked == 7
    contents = [(tmp_path / name / "result.json").read_bytes() for name in ("whole", "parts")]
    assert contents[0] == contents[1]
    assert read_result(tmp_path / "whole").metrics == whole.metrics


def test_books_that_do_not_fit_are_refused_before_anything_is_asked(tmp_path: Path) -> None:
    stub = Stub(looked_up, max_context=200)
    with pytest.raises(ConfigError, match=r"12-0-0-0 has .* tokens .* context is 200"):
        PhonebookSuite(**SMALL).evaluate(stub, tmp_path)
    assert stub.asked == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": (2,)}, "pairs = 2; a book needs 3"),
        ({"pairs": ()}, "pairs is empty"),
        ({"pairs": 1850}, "pairs = 1850; it must be a list"),
        ({"pairs": (10, 10)}, "holds a number twice"),
        ({"pairs": (MOST_NAMES + 1,)}, "different names"),
        ({"variant": "uniqe"}, "did you mean 'unique'"),
        ({"groups": 0}, "groups = 0; it must be"),
        ({"prompts": True}, "prompts = True; it must be"),
        ({"seed": -1}, "seed = -1; it must be"),
        ({"depths": (50, 101)}, "per cent"),
        ({"depths": (50,), "variant": "published"}, "use variant=unique"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        PhonebookSuite(**options)
    assert "\n" not in str(error.value)


def test_a_book_can_have_fewer_names_and_shorter_numbers() -> None:
    suite = PhonebookSuite(
        pairs=(50,), groups=1, batches=1, prompts=3, first_names=8, last_names=9, digits=6
    )
    for item in suite.items():
        lines = [line for line in item.call.prompt.splitlines() if ": " in line][:50]
        assert len({line.split(": ")[0] for line in lines}) == 50
        assert len({line.split()[0] for line in lines}) <= 8
        assert len({line.split()[1] for line in lines}) <= 9
        assert all(len(line.split(": ")[1]) == 6 for line in lines)
        assert len(item.gold["phone"]) == 6
    assert suite.settings["digits"] == 6
    firsts = {name.split()[0] for name in unique_names(random.Random(0), 72, 8, 9)}
    assert firsts == {FIRST_NAMES[at * len(FIRST_NAMES) // 8] for at in range(8)}, "of all letters"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_names": 0}, "first_names"),
        ({"last_names": 100_000}, "in the list"),
        ({"digits": 0}, "digits"),
        ({"pairs": (100,), "first_names": 9, "last_names": 9}, "81 different names"),
        ({"variant": "published", "digits": 6}, "variant=unique"),
    ],
)
def test_entries_that_cannot_be_drawn_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PhonebookSuite(**options)
