"""Which answer a text gives, and whether it is the right one; the one file that opens math-verify.

The last box that is not empty is the answer. Mathematics without any box is searched for one as
math-verify does (an announced answer, else the last formula or number); a choice needs its box.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from sambay.errors import ConfigError, MissingPackage
from sambay.evals.reasoning.guard import GuardedProcess, NoReply

LETTERS = "ABCD"
SECONDS = 10
"""Of processor time for one answer; the usual one takes a hundredth of a second."""
TAIL = 2_000
"""Characters at the end of a text that are searched where no box is."""

_BRACE = re.compile(r"(?P<box>\\boxed\s*\{)|\\.|[{}]", re.DOTALL)
_DELIMITED = re.compile(r"\$+([^$]+)\$+|\\\((.+)\\\)|\\\[(.+)\\\]", re.DOTALL)
# Written between the digits of a large number; unless removed, they mean a product or a sum.
_DIGIT_GAP = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\\[,;:! ]|~| |\{,\}|,\\!)\d{3})+(?!\d)")
_NOT_A_DIGIT = re.compile(r"\D")
_STYLE = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|boldsymbol|bf|rm)\b"
)
_LETTER = re.compile(r"(?<![A-Za-z\\])[A-D](?![A-Za-z'])")
_LABEL = re.compile(r"\(?([A-D])\s*[).:]")


@dataclass(frozen=True)
class Verdict:
    """What a text answers.

    answer: as it is written; None where there is none.
    boxed: whether it is in a box.
    error: why the judge could not decide, which counts as wrong.
    """

    correct: bool
    answer: str | None
    boxed: bool
    error: str | None = None


def last_box(text: str) -> str | None:
    """The content of the last `\\boxed{...}` that is closed and not empty."""
    begins: list[tuple[bool, int]] = []  # of the braces that are open: whether of a box, and where
    last, found = -1, None
    # One pass: a model that repeats itself may open ten thousand boxes.
    for match in _BRACE.finditer(text):
        if match["box"] or match[0] == "{":
            begins.append((match["box"] is not None, match.end()))
        elif match[0] == "}" and begins:
            is_box, begin = begins.pop()
            if is_box and begin > last and text[begin : match.start()].strip():
                last, found = begin, text[begin : match.start()].strip()
    return found


def judge_choice(text: str, gold: str) -> Verdict:
    """Whether the letter in the last box is `gold`; several letters, or none, are no answer."""
    content = last_box(text)
    letter = None if content is None else _letter(content)
    return Verdict(letter == gold, letter, letter is not None)


def final_answer(text: str) -> str:
    """The answer in a reference: its last box, what follows `####`, or all of it."""
    content = last_box(text)
    if content is not None:
        return content
    return text.rpartition("####")[2].strip()


class MathJudge:
    """Decides in a process of its own, so that no formula can stop an evaluation."""

    def __init__(self, *, seconds: int = SECONDS) -> None:
        self._process = GuardedProcess(
            "sambay.evals.judge:compare", seconds=seconds, first={"gold": "1", "answer": "2"}
        )

    def require(self) -> None:
        """Make sure that there is something to judge with.

        Raises:
            MissingPackage: math-verify is not installed.
            ConfigError: it is installed but does not work.
        """
        if importlib.util.find_spec("math_verify") is None:
            raise MissingPackage("math-verify", "judging mathematical answers", "eval")
        reply = self._ask(gold=r"\frac{1}{2}", answer="0.5")
        if not reply["correct"]:
            raise ConfigError(
                f"math-verify is installed but does not judge ({reply.get('error')}); see what "
                'python -c "import math_verify" says'
            )

    def judge(self, text: str, gold: str) -> Verdict:
        """Whether the answer of a text means the same as `gold`."""
        content = last_box(text)
        if content is not None:
            correct, error = self.same(gold, content)
            return Verdict(correct, content, True, error)
        tail = text[-TAIL:].strip()
        if not tail:
            return Verdict(False, None, False)
        reply = self._ask(gold=_plain(gold), text=tail)
        return Verdict(reply["correct"], reply.get("answer"), False, reply.get("error"))

    def same(self, gold: str, answer: str) -> tuple[bool, str | None]:
        """Whether two answers mean the same, and why it could not be decided."""
        gold, answer = _plain(gold), _plain(answer)
        if gold == answer:
            return True, None
        if gold.isascii() and answer.isascii() and gold.isdecimal() and answer.isdecimal():
            return gold.lstrip("0") == answer.lstrip("0"), None
        reply = self._ask(gold=gold, answer=answer)
        return reply["correct"], reply.get("error")

    def close(self) -> None:
        """End the process."""
        self._process.close()

    def _ask(self, **request: str) -> dict[str, Any]:
        try:
            return self._process.ask(**request)
        except NoReply as error:
            return {"correct": False, "error": str(error)}


def compare(gold: str, answer: str | None = None, text: str | None = None) -> dict[str, Any]:
    """Whether `answer`, or what `text` answers, means the same as `gold`; may take for ever.

    Signals, with which math-verify limits its own time, work in the main thread of a process only
    and cannot end a single long operation. So they are off, and this runs in a guarded process.
    """
    import logging

    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    targets = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    reply: dict[str, Any] = {"correct": False}
    errors: list[str] = []

    @contextlib.contextmanager
    def kept() -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  sympy raises anything on what it cannot read
            errors.append(f"{type(error).__name__}: {error}"[:200])

    def forms(content: str) -> list[Any]:
        with kept():
            return parse(content, targets, parsing_timeout=0, raise_on_error=True)
        return []

    golds = forms(_box(gold))
    answers = forms(_box(answer) if text is None else text)
    if text is not None and answers:
        reply["answer"] = str(answers[-1]).strip() or str(answers[0])  # the last is as written
    for one, other in product(golds, answers):
        with kept():
            # One pair that is the same decides, whatever fails on another.
            if verify(one, other, timeout_seconds=0, raise_on_error=True):
                return {**reply, "correct": True}
    return {**reply, "error": errors[0]} if errors else reply


def _box(answer: str | None) -> str:
    return f"\\boxed{{{answer}}}"


def _plain(answer: str) -> str:
    """An answer without the signs around it and the gaps in its numbers."""
    answer = answer.strip()
    if delimited := _DELIMITED.fullmatch(answer):
        answer = next(filter(None, delimited.groups())).strip()
    if answer.endswith(".") and not answer.endswith("\\."):
        answer = answer[:-1].rstrip()
    return _DIGIT_GAP.sub(lambda match: _NOT_A_DIGIT.sub("", match[0]), answer)


def _letter(content: str) -> str | None:
    """The one letter a box names, alone, as a label or within words; None if it names several."""
    plain = re.sub(r"[${}*]|\\[,;:! ]|~", " ", _STYLE.sub(" ", content)).strip()
    if re.fullmatch(r"\(?\s*[a-d]\s*[).]?", plain):
        return plain.strip("(). ").upper()
    letters = set(_LETTER.findall(plain))
    if len(letters) == 1:
        return letters.pop()
    labels = {match[1] for match in _LABEL.finditer(plain)}
    label = _LABEL.match(plain)
    rest = plain[label.end() :].lstrip() if label else ""
    listed = re.match(r"(?:and|or|&|,|/)", rest)
    return label[1] if label and len(labels) == 1 and not listed else None
