"""RULER's needles: lm-eval's own prompts at any length, other haystacks under other names."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("nltk")
pytest.importorskip("wonderwords")

import nltk
import wonderwords

from sambay.errors import ConfigError, DataError, MissingPackage, SambayError
from sambay.evals.calls import Answer, Call, Passage, Score
from sambay.evals.harness import library
from sambay.evals.suites.ruler import RulerSuite
from sambay.evals.tasks.niah import ESSAY_TASKS, TASKS, Haystack, Needles, Writer
from tests.evals.harness_models import fast_tokenizer, read_lines, tokenizer

LENGTH = 1100
# lm-eval puts 500 words at a time into a haystack of essays.
ESSAY_LENGTH = 2400
WORDS = "The sky is one. Here we go again. There is the rest of them all. "
_MODULES = "lm_eval.tasks.ruler"


class FewWords:
    """wonderwords with few words: of all of them lm-eval makes and sorts millions of pairs."""

    def __init__(self) -> None:
        names = [f"{a}{b}" for a in "bcdfg" for b in ("ake", "ird", "one", "ush")]
        self._categories = {"nouns": names, "adjectives": names[::-1], "verbs": []}


def forget_ruler() -> None:
    for name in [name for name in sys.modules if name.startswith(_MODULES)]:
        del sys.modules[name]


@pytest.fixture(scope="module", autouse=True)
def _few_words() -> Iterator[None]:
    forget_ruler()
    tried: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wonderwords, "RandomWord", FewWords)
        with patch.context() as during_import:
            # Where nltk's data are missing, importing lm-eval's module would download them.
            during_import.setattr(nltk.data, "path", [])
            during_import.setattr(nltk, "download", lambda *names, **_: tried.append(names))
            library.import_ruler()
        assert tried == []
        yield
    forget_ruler()


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was tried to be reached; nothing is."""
    tried: list[Any] = []

    def refuse(*arguments: Any, **options: Any) -> NoReturn:
        tried.append(arguments)
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tried


class Finder:
    """A backend that finds the needles, and says the first `most` of the values asked for."""

    def __init__(self, most: int = 9, max_context: int | None = None) -> None:
        self.facts: dict[str, Any] = {"name": "finder"}
        self.max_context = max_context
        self.prefix_id = tokenizer().eos_id
        self.calls: list[Call] = []
        self._most = most

    def encode(self, text: str) -> list[int]:
        return tokenizer().encode(text)

    def prompt_length(self, call: Call) -> int:
        return len(self.encode(call.prompt))

    def generate(self, calls: Sequence[Call], on_answer: Callable[[int, Answer], None]) -> None:
        for index, call in enumerate(calls):
            self.calls.append(call)
            found = re.findall(r"magic \w+ for (\S+) is: (\S+)\.", call.prompt)
            query = call.prompt.rpartition(" for ")[2].partition(" mentioned in")[0]
            keys = re.split(r", and |, ", query)
            values = [value for key, value in found if key in keys]
            on_answer(index, Answer(" " + ", ".join(values[: self._most]), 9, "length"))

    def score(self, passages: Sequence[Passage], on_score: Callable[[int, Score], None]) -> None:
        raise AssertionError("nothing is scored here")


def documents(needles: Needles, samples: int, words: list[str] | None = None) -> list[Any]:
    task = Writer(tokenizer().encode, needles.haystack, words).write(needles, samples)
    return list(task.dataset["test"])


def test_eight_tasks_in_noise(
    tmp_path: Path, network: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    suite = RulerSuite(lengths=(LENGTH, 1300), samples=3, haystack="noise")
    backend = Finder()
    told: list[str] = []
    result = suite.evaluate(
        backend, tmp_path, on_progress=lambda done, total, facts: told.append(facts)
    )
    assert capfd.readouterr() == ("", "")
    assert network == []
    names = [f"{task}[noise]" if task in ESSAY_TASKS else task for task in TASKS]
    assert set(result.metrics) == {
        f"{name}@{length}" for name in (*names, "average[noise]") for length in (LENGTH, 1300)
    }
    assert len(ESSAY_TASKS) == 5
    assert all(metric.value == 1 for metric in result.metrics.values())
    assert result.metrics[f"average[noise]@{LENGTH}"].count == 24
    assert told[1] == f"writing the prompts of niah_single_2[noise]@{LENGTH}"
    # Noise makes niah_single_2 niah_single_1, and what is asked twice is answered once.
    prompts = {call.prompt for call in backend.calls}
    assert 2 * 6 * 3 <= len(prompts) == len(backend.calls) <= 2 * 7 * 3
    longest = {1300: 0, LENGTH: 0}
    for call, line in zip(backend.calls, read_lines(tmp_path / "samples.jsonl"), strict=True):
        assert (call.max_new_tokens, call.stop, call.sampling.greedy) == (128, (), True)
        length = int(line["task"].partition("@")[2])
        text, _, lead = call.prompt.rpartition(" The special magic")
        assert re.search(r" (is|are)$", lead)
        tokens = len(backend.encode(text))
        assert tokens + 128 <= length
        longest[length] = max(longest[length], tokens + 128)
    assert all(most > 0.8 * length for length, most in longest.items())
    details = result.details["tasks"][f"niah_multivalue[noise]@{LENGTH}"]
    assert 0.5 * LENGTH < details["mean_tokens"] <= details["most_tokens"] <= LENGTH
    assert set(result.details["packages"]) == {"wonderwords", "nltk"}
    written = (tmp_path / "result.json").read_bytes()
    again = Finder()
    suite.evaluate(again, tmp_path)
    assert again.calls == []
    assert (tmp_path / "result.json").read_bytes() == written


def test_a_part_of_the_values_is_a_part_of_the_score(tmp_path: Path) -> None:
    tasks = ("niah_multiquery", "niah_single_1", "niah_multivalue")
    suite = RulerSuite((LENGTH,), tasks, samples=4, haystack="noise")
    result = suite.evaluate(Finder(most=1), tmp_path)
    found = {name: metric.value for name, metric in result.metrics.items()}
    assert found == {
        f"niah_single_1@{LENGTH}": 1.0,
        f"niah_multiquery[noise]@{LENGTH}": 0.25,
        f"niah_multivalue[noise]@{LENGTH}": 0.25,
    }


def published(task: str, length: int, folder: Path) -> list[dict[str, Any]]:
    """The first documents of lm-eval's own task, when it is the only one that is asked for."""
    fast_tokenizer().save_pretrained(folder)
    manager = library.module("lm_eval.tasks").TaskManager(
        include_path=str(Path(library.module().__file__).parent / "tasks/ruler"),
        include_defaults=False,
        metadata={"max_seq_lengths": [length], "tokenizer": str(folder)},
    )
    random.seed(0)
    with library.quiet():
        return list(manager.load([task])["tasks"][task].dataset["test"])[:5]


_DEFAULT = ("niah_multikey_3", "niah_multiquery")


@pytest.mark.parametrize(
    "task",
    [task if task in _DEFAULT else pytest.param(task, marks=pytest.mark.slow) for task in TASKS],
)
def test_prompts_are_those_of_lm_eval(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's essays and nltk's sentences alone are stand-ins, in both."""
    _, generator = library.import_ruler()
    texts = {"text": [WORDS * 9, "And again.\n\n" * 9, WORDS * 99]}
    monkeypatch.setattr(generator.datasets, "load_dataset", lambda *names, split: texts)
    monkeypatch.setattr(generator, "cached_sent_tokenize", lambda text: text.split(". "))
    generator.get_haystack.cache_clear()
    try:
        length = ESSAY_LENGTH if task in ESSAY_TASKS else LENGTH
        needles = Needles(task, length, Haystack.ESSAY)
        words = generator.get_haystack("essay")
        random.seed(5)
        ours = documents(needles, 5, words)
        assert ours == published(task, length, tmp_path)
        assert len({document["input"] for document in ours}) == 5
        assert min(document["length"] for document in ours) > 0.5 * length
        assert documents(needles, 2, words) == ours[:2]
    finally:
        generator.get_haystack.cache_clear()


def test_own_essays_have_another_name(tmp_path: Path, network: list[Any]) -> None:
    essays = tmp_path / "essays"
    essays.mkdir()
    (essays / "b.txt").write_text("Blue grass grows. " * 900)
    (essays / "a.md").write_text(WORDS * 9)
    tasks = ("niah_single_2", "niah_multikey_2")
    backend = Finder()
    result = RulerSuite((ESSAY_LENGTH,), tasks, 3, essays).evaluate(backend, tmp_path / "out")
    assert set(result.metrics) == {
        f"niah_single_2[files]@{ESSAY_LENGTH}", f"niah_multikey_2@{ESSAY_LENGTH}"
    }  # fmt: skip
    assert network == []
    assert str(essays) not in json.dumps(result.settings)
    inside = [call.prompt for call in backend.calls if "of them all. Blue grass" in call.prompt]
    assert len(inside) == 3
    # A needle stands between sentences, whatever nltk has, or behind all of them.
    needle = r"[.\n] ?One of the special .* is: \d+\.\s|One of the special .* is: \d+\. \nWhat"
    assert all(re.search(needle, prompt) for prompt in inside)
    assert {call.prompt.split("\n")[1][:15] for call in backend.calls if call.prompt in inside} == {
        "The sky is one."
    }
    (essays / "b.txt").unlink()
    (essays / "a.md").write_text("Too few words.")
    with pytest.raises(ConfigError, match=r"essays: they have \d+ tokens, prompts of 2400 need"):
        RulerSuite((ESSAY_LENGTH,), tasks, 3, essays).evaluate(Finder(), tmp_path / "few")
    (essays / "a.md").write_text("\n")
    with pytest.raises(DataError, match="holds no text"):
        RulerSuite((ESSAY_LENGTH,), tasks, 3, essays).evaluate(Finder(), tmp_path / "none")


def test_without_the_essays_the_remedies_are_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, generator = library.import_ruler()
    told: list[Any] = []

    def mistake() -> str:
        with pytest.raises(SambayError) as caught:
            RulerSuite((LENGTH,), samples=3).evaluate(
                Finder(), tmp_path, on_progress=lambda *seen: told.append(seen)
            )
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def unreachable(type_haystack: str) -> NoReturn:
        raise ConnectionError("Couldn't reach the Hub")

    def no_data(name: str) -> NoReturn:
        raise LookupError(name)

    downloads: list[str] = []
    monkeypatch.setattr(generator, "get_haystack", unreachable)
    message = mistake()
    for words in ("paul_graham_essays", "essays=FOLDER", "haystack=noise", "niah_single_2"):
        assert words in message
    assert "niah_single_1" not in message
    monkeypatch.setattr(generator, "get_haystack", lambda type_haystack: WORDS.split())
    monkeypatch.setattr(generator.nltk.data, "find", no_data)
    monkeypatch.setattr(
        generator.nltk, "download", lambda name, quiet: downloads.append(name) or False
    )
    assert "'punkt_tab'" in (message := mistake())
    assert "NLTK_DATA" in message
    assert downloads == ["punkt_tab"]
    assert told == []
    # Tasks without essays need neither.
    RulerSuite((LENGTH,), ("niah_single_1",), samples=1).evaluate(Finder(), tmp_path)
    assert downloads == ["punkt_tab"]


def test_nothing_is_cut(tmp_path: Path) -> None:
    def suite(length: int) -> RulerSuite:
        return RulerSuite((length,), ("niah_single_1",), samples=2)

    short = Finder(max_context=LENGTH - 1)
    with pytest.raises(ConfigError, match=f"lengths: {LENGTH} tokens, the model's context is"):
        suite(LENGTH).evaluate(short, tmp_path)
    whole = suite(LENGTH).evaluate(Finder(max_context=LENGTH + 100), tmp_path)
    # A length that they nearly fill: RULER does not count what leads over to the answer.
    length = whole.details["tasks"][f"niah_single_1@{LENGTH}"]["most_tokens"] + 12
    full = Finder(max_context=length)
    message = (
        rf"task niah_single_1@{length}, document \d has a prompt of \d+ tokens and may take 128"
    )
    with pytest.raises(ConfigError, match=message):
        suite(length).evaluate(full, tmp_path / "full")
    assert full.calls == short.calls == []


@pytest.mark.parametrize("length", [256, 400])
def test_a_length_without_room(length: int, tmp_path: Path) -> None:
    suite = RulerSuite((length,), ("niah_multivalue",), samples=2, haystack="noise")
    with pytest.raises(ConfigError, match=rf"lengths: {length} tokens have no room for .*longer"):
        suite.evaluate(Finder(), tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": ("niah_single_4",)}, "'niah_single_4' is not known"),
        ({"lengths": ()}, "lengths = .*; give at least one"),
        ({"lengths": (4096, 4096)}, "holds one twice"),
        ({"lengths": (9,)}, "lengths = 9; it must be a whole number of at least 256"),
        ({"samples": 0}, "samples = 0"),
        ({"haystack": "nose"}, r"haystack = 'nose' is not known \(did you mean 'noise'\?\)"),
        ({"haystack": "files"}, "haystack = 'files' is not known"),
        ({"haystack": "noise", "essays": Path("x")}, "noise needs no texts"),
    ],
)
def test_settings_that_cannot_work(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RulerSuite(**fields)


@pytest.mark.parametrize("missing", ["nltk", "wonderwords"])
def test_missing_packages_are_named(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name)
    )
    with pytest.raises(MissingPackage, match=rf"RULER needs the package '{missing}'"):
        RulerSuite(tasks=("niah_single_1",)).evaluate(Finder(), tmp_path)
