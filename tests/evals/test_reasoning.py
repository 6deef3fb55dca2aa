"""Reasoning: what is asked, what counts, and what several samples of a question say together."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("math_verify")

from sambay.errors import ConfigError, DataError
from sambay.evals.calls import Answer, Call, Passage, Score
from sambay.evals.judge import MathJudge
from sambay.evals.reasoning import questions
from sambay.evals.result import RESULT, Result, read_result
from sambay.evals.suites import reasoning
from sambay.evals.suites.reasoning import ReasoningSuite
from sambay.generate.sampling import SamplingParams

MATHEMATICS = "Please reason step by step, and put your final answer within \\boxed{}. "
CHOICE = (
    "Please reason step by step, and put your final choice of one letter from A/B/C/D within "
    "\\boxed{}. "
)
AIME = [{"id": 60, "problem": "What is 6 * 7?", "answer": "42", "year": "2024"},
        {"id": 61, "problem": "What is 2 + 71?", "answer": "073", "year": "2024"}]  # fmt: skip
MATH = [{"problem": "Halve $1$.", "answer": "\\frac{1}{2}", "subject": "Algebra", "level": 1,
         "solution": "It is $\\boxed{\\frac{1}{2}}$.", "unique_id": "test/algebra/1"}]  # fmt: skip
GPQA = [{"Question": f"Which one, {name}?\n", "Correct Answer": "right", "Record ID": name,
         "Incorrect Answer 1": "one\n", "Incorrect Answer 2": "two",
         "Incorrect Answer 3": "three"} for name in ("Ann", "Bob", "Cy", "Di", "Ed")]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _one_judge() -> Iterator[None]:
    """One process for all evaluations here: starting it takes longer than they do."""
    judge = MathJudge()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "close", lambda: None)
        patch.setattr(reasoning, "MathJudge", lambda: judge)
        yield
    judge.close()


class Scripted:
    """Says for a question's samples, in turn, what its script has."""

    def __init__(self, script: dict[str, list[str]], stop_after: int | None = None) -> None:
        self.facts: dict[str, Any] = {"name": "scripted"}
        self.max_context = None
        self.prefix_id = 0
        self.script, self.stop_after = script, stop_after
        self.asked: list[Call] = []
        self.seeds: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def prompt_length(self, call: Call) -> int:
        return len(call.prompt)

    def generate(self, calls: Sequence[Call], on_answer: Callable[[int, Answer], None]) -> None:
        order = list(range(len(calls)))
        random.Random(self.stop_after).shuffle(order)  # answers come in any order
        for number in order[: self.stop_after]:
            call = calls[number]
            self.asked.append(call)
            # What is said depends on the seed alone, as a model's answer does.
            place = self.seeds[call.prompt].index(call.sampling.seed)
            name = next(name for name in self.script if name in call.prompt)
            text = self.script[name][place]
            cut = text.endswith("...")
            on_answer(number, Answer(text, 10 * place + 10, "length" if cut else "stop"))
        if self.stop_after is not None and self.stop_after < len(order):
            raise KeyboardInterrupt

    def score(self, passages: Sequence[Passage], on_score: Callable[[int, Score], None]) -> None:
        raise AssertionError("nothing here is scored")


def write_lines(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def evaluate(
    suite: ReasoningSuite, script: dict[str, list[str]], out: Path, stop_after: int | None = None
) -> tuple[Result, Scripted]:
    backend = Scripted(script, stop_after)
    for item in suite.items():
        backend.seeds.setdefault(item.call.prompt, []).append(item.call.sampling.seed)
    return suite.evaluate(backend, out), backend


def test_aime_is_asked_as_published(tmp_path: Path) -> None:
    suite = ReasoningSuite(benchmark="aime24", data=write_lines(tmp_path / "aime.jsonl", AIME))
    items = suite.items()
    assert len(items) == 2 * 64
    assert [item.key for item in items[62:66]] == ["0/62", "0/63", "1/0", "1/1"]
    first = items[0]
    assert first.call.prompt == MATHEMATICS + "What is 6 * 7?"
    assert first.call.max_new_tokens == 32768
    assert first.call.chat
    assert first.call.sampling == SamplingParams(
        temperature=0.6, top_p=0.95, seed=first.call.sampling.seed
    )
    assert first.gold == {"answer": "42"}
    # Neighbours share a prompt, and no two answers anywhere share their random numbers.
    assert {item.call.prompt for item in items[:64]} == {first.call.prompt}
    assert len({item.call.sampling.seed for item in items}) == len(items)


def test_math_500_is_asked_as_published(tmp_path: Path) -> None:
    folder = tmp_path / "MATH-500"
    folder.mkdir()
    write_lines(folder / "test.jsonl", MATH)
    write_lines(folder / "train.jsonl", AIME)
    items = ReasoningSuite(benchmark="math500", data=folder).items()
    assert len(items) == 8
    assert items[0].call.prompt == MATHEMATICS + "Halve $1$."
    assert items[0].gold == {"answer": "\\frac{1}{2}"}


def test_gpqa_is_asked_as_published(tmp_path: Path) -> None:
    suite = ReasoningSuite(benchmark="gpqa", data=write_lines(tmp_path / "gpqa.jsonl", GPQA))
    items = suite.items()
    assert len(items) == 5 * 8
    letters = [item.gold["answer"] for item in items[::8]]
    assert letters == ["D", "C", "A", "D", "A"]
    assert items[8].call.prompt == (
        CHOICE + "Which one, Bob?\n\n\nA) one\n\nB) two\nC) right\nD) three"
    )
    assert items[16].call.prompt.endswith("\n\nA) right\nB) one\n\nC) two\nD) three")
    other = ReasoningSuite(benchmark="gpqa", data=suite.data, seed=2).items()
    assert [item.gold["answer"] for item in other[::8]] != letters


def test_gpqa_is_read_from_its_own_file(tmp_path: Path) -> None:
    (tmp_path / "gpqa_main.csv").write_text("Question\nnot this\n")
    header = ",".join(name for name in GPQA[0] if name != "Record ID")
    (tmp_path / "gpqa_diamond.csv").write_text(header + '\n"Why,\nyes?",a,b,c,d\n')
    (item, *_) = ReasoningSuite(benchmark="gpqa", data=tmp_path).items()
    assert item.call.prompt.startswith(CHOICE + "Why,\nyes?\n\nA) ")


def test_samples_and_seeds_stay_when_there_are_more(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "all.jsonl", AIME)
    few = ReasoningSuite(data=data, samples=2, limit=1).items()
    many = ReasoningSuite(data=data, samples=5).items()
    assert few == many[:2]
    reordered = write_lines(tmp_path / "reordered.jsonl", AIME[::-1])
    moved = ReasoningSuite(data=reordered, samples=5).items()
    assert [item.call for item in moved[5:]] == [item.call for item in many[:5]]


def test_own_questions_have_many_forms(tmp_path: Path) -> None:
    rows = [
        {"question": "One?", "answer": 1},
        {"problem": "Two?", "solution": "We find $\\boxed{1}$ and $\\boxed{2}$."},
        {"question": "Three?", "answer": "Counting.\n#### 3"},
        {"prompt": "Four?", "final_answer": "4", "metadata": None},
    ]
    data = write_lines(tmp_path / "own.jsonl", rows)
    items = ReasoningSuite(data=data).items()
    assert [item.key for item in items] == ["0/0", "1/0", "2/0", "3/0"]
    assert [item.gold["answer"] for item in items] == ["1", "2", "3", "4"]
    named = write_lines(tmp_path / "named.jsonl", [{"q": "Five?", "a": "5", "question": "no"}])
    (item,) = ReasoningSuite(data=named, question_field="q", answer_field="a").items()
    assert (item.call.prompt, item.gold["answer"]) == (MATHEMATICS + "Five?", "5")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "a", "answer": "1"}\n{"question": "b"}\n', r"question 1 has no field 'ans"),
        ('{"answer": "1"}\n', r"question 0 has no field 'question' or .*\(it has 'answer'\)"),
        ('{"question": "a", "answer": null}\n', r"question 0: field 'answer' is None"),
        ('{"question": " ", "answer": "1"}\n', r"question 0: field 'question' is ' '"),
        ('{"question": "a", "answer": "####"}\n', r"question 0 has no answer behind"),
        ('{"question": "a", "answer": "1"}\n{"quest', r"line 2 is not JSON"),
        ("[1]\n", r"question 0 is no JSON object"),
        ("\n", r"holds no questions"),
        (None, r"does not exist"),
    ],
)
def test_data_that_cannot_be_asked_are_told(
    content: str | None, message: str, tmp_path: Path
) -> None:
    data = tmp_path / "own.jsonl"
    if content is not None:
        data.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        ReasoningSuite(data=data).evaluate(Scripted({}), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_must_say_which_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no file with questions"):
        ReasoningSuite(data=tmp_path).items()
    write_lines(tmp_path / "a.jsonl", AIME)
    assert len(ReasoningSuite(data=tmp_path).items()) == 2
    write_lines(tmp_path / "b.csv", AIME)
    with pytest.raises(DataError, match=r"several files, such as a\.jsonl,"):
        ReasoningSuite(data=tmp_path).items()


def test_without_the_hub_the_remedy_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(config: dict[str, Any]) -> None:
        raise ConnectionError(f"no route to {config['dataset_path']}\nand more")

    monkeypatch.setattr(questions.library, "make_task", no_network)
    with pytest.raises(DataError) as caught:
        ReasoningSuite().evaluate(Scripted({}), tmp_path / "out")
    assert str(caught.value) == (
        "HuggingFaceH4/aime_2024 cannot be loaded (ConnectionError: no route to "
        "HuggingFaceH4/aime_2024); put its questions into a file, one JSON object a line with the "
        "fields 'problem', 'answer', and give benchmark=aime24 data=FILE.jsonl"
    )


def test_parquet_is_read_as_the_hub_has_it(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "aime_2024" / "data"
    folder.mkdir(parents=True)
    file = folder / "train-00000-of-00001.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(AIME), file)
    lines = ReasoningSuite(benchmark="aime24", data=write_lines(tmp_path / "a.jsonl", AIME))
    assert ReasoningSuite(benchmark="aime24", data=folder.parent).items() == lines.items()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"benchmark": "aime2024"}, r"'aime2024' is not known \(did you mean 'aime24'\?\)"),
        ({"benchmark": "own"}, "give data="),
        ({"samples": 0}, "samples = 0"),
        ({"limit": 0}, "limit = 0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens = 1.5"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": 0.0}, "samples = 64, but with temperature = 0"),
    ],
)
def test_settings_that_cannot_work_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReasoningSuite(**options)


BOX = "so \\boxed{%s}"
SCRIPT = {
    # Right twice of four; the wrong ones differ. The first majority of two is a tie.
    "6 * 7": [BOX % "42", BOX % "41", "it is 42", BOX % "40"],
    # Right once; the wrong ones are the same in two notations, and one is cut off.
    "2 + 71": [BOX % "0.5", BOX % "\\frac12", BOX % "73", "let us see..."],
}


def test_metrics_of_a_scripted_model_are_exact(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "aime.jsonl", AIME)
    suite = ReasoningSuite(benchmark="aime24", data=data, samples=4)
    result, _ = evaluate(suite, SCRIPT, tmp_path / "out")
    values = {name: metric.value for name, metric in result.metrics.items()}
    assert values["pass@1"] == (2 / 4 + 1 / 4) / 2
    assert result.metrics["pass@1"].stderr == pytest.approx(0.125)  # of 0.5 and 0.25
    assert result.metrics["pass@1"].count == 2
    assert values["boxed_pass@1"] == (1 / 4 + 1 / 4) / 2
    assert values["pass@2"] == pytest.approx((5 / 6 + 3 / 6) / 2)
    assert values["pass@4"] == 1
    # (42, 41): the first of equals is right; (42, 40) too. (1/2, 0.5): wrong; (73, none): right.
    assert values["maj@2"] == (1 + 1 / 2) / 2
    assert values["maj@4"] == (1 + 0) / 2
    assert values["boxed"] == 6 / 8
    assert values["no_answer"] == 1 / 8
    assert values["cut_off"] == 1 / 8
    assert values["tokens_mean"] == values["tokens_median"] == 25
    assert values["tokens_p95"] == 40
    assert result.details["questions"] == {
        "0": {"correct": 2, "samples": 4, "answers": 3},
        "1": {"correct": 1, "samples": 4, "answers": 2},
    }
    assert result.details["judge_errors"] == 0
    assert sum(one["samples"] for one in result.details["lengths"]) == 8
    assert sum(one["correct"] for one in result.details["lengths"]) == 3
    assert read_result(tmp_path / "out").metrics == result.metrics


def test_letters_are_counted_by_letter(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "gpqa.jsonl", GPQA[:2])  # right: D and C
    suite = ReasoningSuite(benchmark="gpqa", data=data, samples=3)
    script = {
        "Ann": [BOX % "D", BOX % "\\text{B}", BOX % "B"],
        "Bob": ["The answer is C.", BOX % "C and B", BOX % "(C)"],
    }
    result, _ = evaluate(suite, script, tmp_path / "out")
    assert result.metrics["pass@1"].value == pytest.approx(1 / 3)
    assert result.metrics["maj@3"].value == 1 / 2
    assert result.metrics["no_answer"].value == pytest.approx(1 / 3)
    assert "pass@4" not in result.metrics
    assert "maj@4" not in result.metrics


def test_interrupted_anywhere_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    suite = ReasoningSuite(
        benchmark="aime24", data=write_lines(tmp_path / "aime.jsonl", AIME), samples=4
    )
    evaluate(suite, SCRIPT, tmp_path / "whole")
    asked = []
    for stop_after in (3, 1, 2, None):
        with contextlib.suppress(KeyboardInterrupt):
            _, backend = evaluate(suite, SCRIPT, tmp_path / "parts", stop_after)
            asked = backend.asked
    assert len(asked) == 2  # what was known was not asked again
    whole = (tmp_path / "whole" / RESULT).read_bytes()
    assert (tmp_path / "parts" / RESULT).read_bytes() == whole


def test_where_the_data_lie_decides_nothing(tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        data = write_lines(tmp_path / place / "aime.jsonl", AIME)
        suite = ReasoningSuite(benchmark="aime24", data=data, samples=4)
        _, backend = evaluate(suite, SCRIPT, tmp_path / "out")
        assert bool(backend.asked) == (place == "a")  # the second time nothing is left to ask


def test_a_judge_that_fails_counts_as_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_lines(tmp_path / "own.jsonl", AIME[:1])
    suite = ReasoningSuite(data=data)
    monkeypatch.setattr(suite._math, "same", lambda gold, answer: (False, "it fell asleep"))
    result, _ = evaluate(suite, {"6 * 7": [BOX % "42"]}, tmp_path / "out")
    assert result.metrics["pass@1"].value == 0
    assert result.details["judge_errors"] == 1
    (record,) = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert json.loads(record)["judge_error"] == "it fell asleep"


def test_pictures_show_lengths(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data = write_lines(tmp_path / "aime.jsonl", AIME)
    suite = ReasoningSuite(benchmark="aime24", data=data, samples=4)
    evaluate(suite, SCRIPT, tmp_path / "out")
    (figure,) = suite.pictures(read_result(tmp_path / "out")).values()
    left, right = figure.axes
    everything, correct = (line.get_ydata() for line in left.lines[:2])
    assert sum(everything) == pytest.approx(100)
    assert sum(correct) == pytest.approx(100 * 3 / 8)
    assert list(right.lines[0].get_ydata()) == [50, 0, 100, 0]
