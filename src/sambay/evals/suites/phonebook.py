"""Phonebook as a suite: the published protocol at any lengths, and accuracy by depth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sambay.errors import ConfigError, nearest
from sambay.evals.calls import Answer, Backend, Call
from sambay.evals.phonebook.books import (
    ALL_NAMES,
    FEWEST_PAIRS,
    Entries,
    Protocol,
    Variant,
    first_line,
    questions,
)
from sambay.evals.phonebook.comparison import draw_depths, draw_lengths
from sambay.evals.phonebook.names import FIRST_NAMES, LAST_NAMES
from sambay.evals.result import Result
from sambay.evals.runner import Item, Progress, run_suite
from sambay.evals.statistics import Metric, population_deviation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Records = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class PhonebookSuite:
    """The number of a name in a book, asked `groups` x `batches` x `prompts` times for each length.

    pairs: entries of a book, for each length; 1,850 are about 32K tokens of Llama 2.
    variant: "unique", where no name occurs twice in a book, or "published", the very prompts of the
        published evaluation (needs the package `names`), where a question may be ambiguous: with
        1,850, 3,700 and 7,400 entries, 0, 1 and 3 of the 128 are.
    depths: per cent of the book at which the entry asked for lies, in turn, such as 0,25,50,75,100;
        none: anywhere, as published. Only where names are unique.
    depth_bins: parts of the book for which accuracy is reported where `depths` has none.
    instruction: begin the prompt with a sentence that says whose number will be asked for.
    first_names, last_names: how many different ones there are; digits: of a number. Fewer make a
        book that small models can be trained on. Only where names are unique.

    Raises:
        ConfigError: a setting that cannot work.
    """

    name: ClassVar[str] = "phonebook"

    pairs: tuple[int, ...] = (1850,)
    variant: Variant = Variant.UNIQUE
    groups: int = 4
    batches: int = 8
    prompts: int = 4
    max_new_tokens: int = 20
    seed: int = 42
    instruction: bool = False
    depths: tuple[int, ...] = ()
    depth_bins: int = 8
    first_names: int = len(FIRST_NAMES)
    last_names: int = len(LAST_NAMES)
    digits: int = 10

    def __post_init__(self) -> None:
        if self.variant not in list(Variant):
            known = nearest(str(self.variant), list(Variant))
            raise ConfigError(f"variant = '{self.variant}' is not known{known}")
        object.__setattr__(self, "variant", Variant(self.variant))
        for name in ("pairs", "depths"):
            values = getattr(self, name)
            if not isinstance(values, tuple | list) or any(type(one) is not int for one in values):
                raise ConfigError(f"{name} = {values!r}; it must be a list of whole numbers")
            if len(set(values)) < len(values):
                raise ConfigError(f"{name} = {values!r} holds a number twice; leave one out")
            object.__setattr__(self, name, tuple(values))
        for name in ("groups", "batches", "prompts", "max_new_tokens", "depth_bins"):
            _check_whole(name, getattr(self, name), least=1)
        _check_whole("seed", self.seed, least=0)
        self._check_entries()
        self._check_pairs()
        if any(not 0 <= depth <= 100 for depth in self.depths):
            raise ConfigError(f"depths = {self.depths}; they are per cent, from 0 to 100")
        if self.depths and self.variant is Variant.PUBLISHED:
            raise ConfigError(
                "depths: the published prompts have their entries where they are; use "
                "variant=unique to choose the depth"
            )

    @property
    def _entries(self) -> Entries:
        return Entries(self.first_names, self.last_names, self.digits)

    def _check_entries(self) -> None:
        for name, most in (("first_names", len(FIRST_NAMES)), ("last_names", len(LAST_NAMES))):
            value = getattr(self, name)
            _check_whole(name, value, least=1)
            if value > most:
                raise ConfigError(f"{name} = {value}; there are {most} in the list")
        _check_whole("digits", self.digits, least=1)
        if self.variant is Variant.PUBLISHED and self._entries != ALL_NAMES:
            raise ConfigError(
                "first_names, last_names, digits: the published prompts have theirs; use "
                "variant=unique to choose them"
            )

    def _check_pairs(self) -> None:
        if not self.pairs:
            raise ConfigError("pairs is empty; give at least one length, such as 1850")
        if min(self.pairs) < FEWEST_PAIRS:
            raise ConfigError(
                f"pairs = {min(self.pairs)}; a book needs {FEWEST_PAIRS} entries, two examples and "
                "the one asked for"
            )
        most = self.first_names * self.last_names
        if self.variant is Variant.UNIQUE and max(self.pairs) > most:
            raise ConfigError(
                f"pairs = {max(self.pairs)}; there are {most:,} different names, so a book "
                "cannot be longer"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides what is asked and what counts."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    def items(self) -> list[Item]:
        """The questions of all lengths.

        Raises:
            MissingPackage: the published variant, without the package `names`.
        """
        options = ("variant", "groups", "batches", "prompts", "seed", "instruction", "depths")
        protocol = Protocol(
            **{name: getattr(self, name) for name in options}, entries=self._entries
        )
        return [
            # No stop string: whether a line or the whole text ended behind the number matters.
            Item(
                question.key,
                Call(question.prompt, self.max_new_tokens),
                {
                    "pairs": pairs,
                    "group": question.group,
                    "name": question.name,
                    "phone": question.phone,
                    "needle": question.needle,
                    "depth": question.needle / pairs,
                    "homonyms": list(question.homonyms),
                },
            )
            for pairs in self.pairs
            for question in questions(pairs, protocol)
        ]

    def judge(self, item: Item, answer: Answer) -> dict[str, Any]:
        """Whether the first line is the number, and what else it is.

        ends_text: nothing, not even the end of the line, came before the end of the text. The
            published scoring reads the end-of-text token as part of the line, which is then wrong.
        in_book: the line is the number of some entry.
        is_homonym: it is that of another entry under the very name, where the question is
            ambiguous.
        """
        line = first_line(answer.text)
        ends_text = "\n" not in answer.text and answer.finish_reason == "stop"
        is_refused = ends_text and self.variant is Variant.PUBLISHED
        return {
            "prediction": line,
            "correct": line == item.gold["phone"] and not is_refused,
            "ends_text": ends_text,
            "in_book": len(line) == 10 and f": {line}\n" in item.call.prompt,
            "is_homonym": line != item.gold["phone"] and line in item.gold["homonyms"],
        }

    def summarise(
        self, items: Sequence[Item], records: Records
    ) -> tuple[dict[str, Metric], dict[str, Any]]:
        """`accuracy@PAIRS` of each length; its groups, kinds of errors and accuracy by depth."""
        metrics: dict[str, Metric] = {}
        lengths: dict[str, Any] = {}
        for pairs in self.pairs:
            asked = [item for item in items if item.gold["pairs"] == pairs]
            right = {item.key: bool(records[item.key]["correct"]) for item in asked}
            groups = [
                _share([right[item.key] for item in asked if item.gold["group"] == group])
                for group in range(self.groups)
            ]
            accuracy = math.fsum(groups) / len(groups)
            metrics[f"accuracy@{pairs}"] = Metric(
                accuracy, _binomial_error(accuracy, len(asked)), len(asked)
            )
            wrong = [records[item.key] for item in asked if not right[item.key]]
            unambiguous = [right[item.key] for item in asked if not item.gold["homonyms"]]
            lengths[str(pairs)] = {
                "groups": groups,
                "group_deviation": population_deviation(groups),
                "ambiguous_questions": len(asked) - len(unambiguous),
                "accuracy_of_unambiguous": _share(unambiguous) if unambiguous else None,
                "wrong": len(wrong),
                "wrong_but_in_book": sum(bool(record["in_book"]) for record in wrong),
                "wrong_but_homonym": sum(bool(record["is_homonym"]) for record in wrong),
                "ends_text": sum(bool(records[item.key]["ends_text"]) for item in asked),
                "by_depth": self._by_depth(asked, right),
            }
        return metrics, {"lengths": lengths}

    def _by_depth(self, asked: Sequence[Item], right: Mapping[str, bool]) -> list[dict[str, Any]]:
        """Accuracy in the parts of the book that hold entries asked for, from its beginning."""
        bins: dict[tuple[float, float], list[bool]] = {}
        for item in asked:
            bins.setdefault(self._bin_of(item), []).append(right[item.key])
        return [
            {
                "from": low,
                "to": high,
                "accuracy": _share(answers),
                "stderr": _binomial_error(_share(answers), len(answers)),
                "count": len(answers),
            }
            for (low, high), answers in sorted(bins.items())
        ]

    def _bin_of(self, item: Item) -> tuple[float, float]:
        """The part of the book in which an entry lies; a chosen depth is a part of its own."""
        depth = item.gold["depth"]
        if self.depths:
            return depth, depth
        number = item.gold["needle"] * self.depth_bins // item.gold["pairs"]
        return number / self.depth_bins, (number + 1) / self.depth_bins

    def evaluate(
        self, backend: Backend, out: Path, *, on_progress: Progress | None = None
    ) -> Result:
        """The result, written to OUT/result.json; see `run_suite`, whose errors it raises."""
        return run_suite(_Measured(self, backend), backend, out, on_progress=on_progress)

    def pictures(self, result: Result) -> dict[str, Figure]:
        """Accuracy against length and against the depth of the entry asked for.

        Raises:
            MissingPackage: matplotlib is not installed.
        """
        return {"length": draw_lengths([result]), "depth": draw_depths(result)}


class _Measured:
    """The suite as one backend sees it: with the tokens that its tokenizer makes of the prompts."""

    def __init__(self, suite: PhonebookSuite, backend: Backend) -> None:
        self.name, self.settings = suite.name, suite.settings
        self.judge = suite.judge
        self._suite, self._backend = suite, backend
        self._items: list[Item] = []

    def items(self) -> list[Item]:
        return self._suite.items()

    def summarise(
        self, items: Sequence[Item], records: Records
    ) -> tuple[dict[str, Metric], dict[str, Any]]:
        metrics, details = self._suite.summarise(items, records)
        for pairs, facts in details["lengths"].items():
            tokens = [
                self._backend.prompt_length(item.call)
                for item in items
                if item.gold["pairs"] == int(pairs)
            ]
            facts["mean_prompt_tokens"] = sum(tokens) / len(tokens)
            facts["longest_prompt_tokens"] = max(tokens)
        return metrics, details


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)


def _binomial_error(share: float, count: int) -> float:
    return math.sqrt(share * (1 - share) / count)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_whole(name: str, value: Any, *, least: int) -> None:
    if type(value) is not int or value < least:
        raise ConfigError(f"{name} = {value!r}; it must be a whole number of at least {least}")
