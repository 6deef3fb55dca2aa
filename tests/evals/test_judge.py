"""What counts as an answer, and as the right one, on input that tries to break it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("math_verify")

from sambay.errors import ConfigError, MissingPackage
from sambay.evals.judge import (
    MathJudge,
    Verdict,
    compare,
    final_answer,
    judge_choice,
    last_box,
)
from sambay.evals.reasoning import guard
from sambay.evals.reasoning.guard import GuardedProcess, NoReply


@pytest.fixture(scope="module")
def judge() -> Iterator[MathJudge]:
    judge = MathJudge()
    judge.require()
    yield judge
    judge.close()


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed {42}", "42"),
        (r"first \boxed{3}, then \boxed{42}", "42"),
        (r"\boxed{42}, within \boxed{}", "42"),  # an empty box answers nothing
        (r"\boxed{ \frac{1}{\sqrt{2}} }", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{x : x > 1\right\}}", r"\left\{x : x > 1\right\}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"} \boxed{5}", "5"),
        (r"\boxed{7} or rather \boxed{8", "7"),  # cut off inside a box
        (r"\boxed{8", None),
        (r"\boxed{}", None),
        (r"\boxed{ }", None),
        ("nothing", None),
        ("", None),
    ],
)
def test_the_last_closed_box_that_is_not_empty_counts(text: str, content: str | None) -> None:
    assert last_box(text) == content


def test_boxes_are_found_in_one_pass() -> None:
    started = time.process_time()
    assert last_box("\\boxed{" * 50_000) is None
    assert last_box("\\boxed{" * 50_000 + "1" + "}" * 50_000) == "1"
    assert last_box("\\boxed{7}" + "x{" * 200_000) == "7"
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("42", " 42 "),
        ("42", "042"),
        ("073", "73"),
        ("42", "42."),
        ("42", "$42$"),
        ("42", r"\(42\)"),
        ("1234", "1,234"),
        ("1,234", "1234"),
        ("1234", "1{,}234"),
        ("1234", r"1\,234"),
        ("12345678", "12 345 678"),
        (r"\$32,348", "32348"),
        (r"\frac{1}{2}", "0.5"),
        (r"\frac12", "1/2"),
        (r"\dfrac{3}{4}", r"\tfrac34"),
        ("0.333333", r"\frac13"),
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
        ("2^{10}", "1024"),
        (r"50\%", "0.5"),
        ("50", r"50\%"),
        (r"45^\circ", "45"),
        ("5", r"5 \text{ cm}"),
        ("5", "x = 5"),
        ("p - q", "-q + p"),
        ("x^2 + 2x + 1", "(x+1)^2"),
        ("6 - 5i", "-5i + 6"),
        ("(1, 2)", "(1,2)"),
        (r"\left(3, \frac{\pi}{2}\right)", r"(3, \pi/2)"),
        (r"\{1, 2\}", r"\{2, 1\}"),
        ("1, 2", "2, 1"),
        (r"[2, \infty)", r"[2,\infty)"),
        (r"\text{east}", "east"),
        (r"\text{(C)}", "C"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        (r"4343_6", r"4343_{6}"),
    ],
)
def test_the_same_in_other_words_is_right(judge: MathJudge, gold: str, answer: str) -> None:
    assert judge.judge(f"So \\boxed{{{answer}}}.", gold) == Verdict(True, answer.strip(), True)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("42", "43"),
        ("42", "-42"),
        ("235", "1 234"),  # a number with a gap, not the sum of 1 and 234
        ("235", r"1\,234"),
        ("0.33", r"\frac13"),
        ("(1, 2)", "(2, 1)"),
        ("(1, 2)", "[1, 2]"),
        (r"\text{east}", r"\text{west}"),
        ("42", r"\text{The answer is } 42"),  # read as math-verify reads it, a product of letters
        ("42", "forty-two"),
        ("42", r"\sqrt{}"),
        ("42", r"\frac{1}{0}"),
        ("42", "__import__('os')._exit(0)"),
        ("42", "\x00\ud800"),
    ],
)
def test_anything_else_is_wrong(judge: MathJudge, gold: str, answer: str) -> None:
    verdict = judge.judge(f"So \\boxed{{{answer}}}.", gold)
    assert (verdict.correct, verdict.boxed) == (False, True)


def test_the_last_of_several_boxes_decides(judge: MathJudge) -> None:
    assert judge.judge(r"\boxed{42} no, \boxed{41}", "42") == Verdict(False, "41", True)
    assert judge.judge(r"\boxed{41} no, \boxed{42}", "42") == Verdict(True, "42", True)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The final answer is 42.", "42"),
        ("It follows that 42", "42"),
        ("With 7 before, $x = 42$", "x = 42"),
        ("word " * 100_000 + "so it is 42", "42"),
    ],
)
def test_an_answer_without_a_box_is_told_apart(judge: MathJudge, text: str, answer: str) -> None:
    assert judge.judge(text, "42") == Verdict(True, answer, False)


@pytest.mark.parametrize(
    "text", ["", "I do not know.", "so it is \\boxed{42", "42 " * 3 + "long ago" + " word" * 1000]
)
def test_nothing_to_be_found_is_no_answer(judge: MathJudge, text: str) -> None:
    assert judge.judge(text, "42") == Verdict(False, None, False)


@pytest.mark.parametrize(
    ("content", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        (r"\text{B}", "B"),
        (r"\textbf{(B)}", "B"),
        (r"{\bf B}", "B"),
        ("Option B", "B"),
        (r"\text{B) } 42 \text{ A}", "B"),
        ("B. Delta waves", "B"),
        ("A and B", None),
        ("A, B", None),
        ("A) and B)", None),
        ("AB", None),
        ("E", None),
        ("none", None),
        ("Because", None),
    ],
)
def test_a_box_names_one_letter_or_none(content: str, letter: str | None) -> None:
    verdict = judge_choice(f"So \\boxed{{{content}}}", "B")
    assert verdict == Verdict(letter == "B", letter, letter is not None)


@pytest.mark.parametrize(
    "text",
    [
        r"The answer is not B, so \boxed{A}",
        r"The answer is B.",
        r"\boxed{B} would be nice, but \boxed{C}",
        r"so \boxed{B",
        "",
    ],
)
def test_a_letter_outside_the_last_box_does_not_count(text: str) -> None:
    assert not judge_choice(text, "B").correct


def test_the_answer_of_a_reference() -> None:
    assert final_answer(" 42 ") == "42"
    assert final_answer("We add them.\n#### 42") == "42"
    assert final_answer(r"Thus $x = \boxed{\frac12}$.") == r"\frac12"


def test_what_takes_too_long_is_wrong_and_the_next_answer_is_judged() -> None:
    judge = MathJudge(seconds=1)
    verdict = judge.judge(r"\boxed{10^{10^{10}}}", "1")
    assert not verdict.correct
    assert verdict.error == "no reply within 1 s of processor time"
    assert judge.judge(r"\boxed{\frac12}", "0.5").correct
    judge.close()


def test_an_exception_is_wrong_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*arguments: object, **options: object) -> bool:
        raise RecursionError("too deep")

    monkeypatch.setattr("math_verify.verify", raises)
    assert compare("1", "2") == {"correct": False, "error": "RecursionError: too deep"}
    # math-verify also compares what was written; one comparison that succeeds decides.
    monkeypatch.setattr(
        "math_verify.verify", lambda one, other, **_: raises() if one != "1/2" else other == "0.5"
    )
    monkeypatch.setattr(
        "math_verify.parse", lambda text, *_, **__: [0, text.removeprefix("\\boxed{")[:-1]]
    )
    assert compare("1/2", "0.5") == {"correct": True}
    assert compare("1/2", "0.6")["error"] == "RecursionError: too deep"


def test_it_judges_outside_the_main_thread(judge: MathJudge) -> None:
    found: list[Verdict] = []
    threads = [
        threading.Thread(target=lambda: found.append(judge.judge(r"\boxed{2/4}", "0.5")))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [verdict.correct for verdict in found] == [True] * 3


def test_missing_or_broken_math_verify_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = MathJudge()
    monkeypatch.setattr(broken, "_process", GuardedProcess("sambay.evals.judge:none", seconds=1))
    with pytest.raises(ConfigError, match=r"ended with code 1.*import math_verify"):
        broken.require()
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(MissingPackage, match=r"math-verify.*sambay\[eval\]"):
        MathJudge().require()


def test_a_process_that_ends_is_started_again() -> None:
    process = GuardedProcess("json:loads", seconds=1)
    assert process.ask(s="[1]") == [1]
    with pytest.raises(NoReply, match="ended with code 1"):
        process.ask(s="[")
    assert process.ask(s="[2]") == [2]
    assert process._process is not None
    process._process.kill()  # as a machine that is out of memory does, between two requests
    process._process.wait()
    assert process.ask(s="[3]") == [3]
    process.close()
    with pytest.raises(NoReply, match="ended with code 3"):
        GuardedProcess("os:_exit", seconds=1).ask(status=3)


def test_a_process_that_sleeps_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_WALL_FACTOR", 1)
    with pytest.raises(NoReply, match="no reply within 1 s"):
        GuardedProcess("subprocess:call", seconds=1).ask(args=["sleep", "20"])
