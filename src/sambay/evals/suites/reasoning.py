"""Problems with checked answers, several samples of each, as the published evaluation asks them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sambay.errors import ConfigError, nearest
from sambay.evals.calls import Answer, Backend, Call
from sambay.evals.judge import MathJudge, judge_choice
from sambay.evals.reasoning.questions import BENCHMARKS, OWN, question_seed, read_questions
from sambay.evals.reasoning.samples import (
    Sample,
    by_length,
    classes,
    majority_at,
    pass_at,
    powers_of_two,
    quantile,
)
from sambay.evals.result import Result
from sambay.evals.runner import Item, Progress, run_suite
from sambay.evals.statistics import Metric, mean_of_groups
from sambay.evals.tasks.selection import check_whole
from sambay.generate.sampling import SamplingParams, sample_seed
from sambay.plots.curves import Curve, Panel, draw_panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Records = Mapping[str, Mapping[str, Any]]
_SAMPLING = ("temperature", "top_p", "seed")


@dataclasses.dataclass(frozen=True)
class ReasoningSuite:
    """The published evaluation of reasoning: boxed answers, drawn several times, judged by meaning.

    benchmark: aime24, aime25, math500, gpqa (its diamond questions), or own; without it aime24, and
        own where there are data.
    data: where to take the questions from instead of the hub: a file (.jsonl, .csv, .parquet) with
        the fields of the published data set, or a copy of its folder. For `own`, question or
        problem and answer or solution, whose last box, or what follows `####`, is the answer.
    question_field, answer_field: other names of these fields.
    samples: answers to each question (64 for aime, 8 for math500 and gpqa, 1 for own).
    max_new_tokens: most tokens of an answer. The published limit holds prompt and answer together,
        so that its answers may be shorter by their prompt.
    seed: of all that is drawn: each sample of each question has a seed of its own, which depends on
        the question's text and the sample's number only. Also where the right option of gpqa
        stands.
    limit: only the first questions, for a quick look.
    chat: write the question as a user's turn, as the model's chat template says.

    Raises:
        ConfigError: a setting that cannot work.
    """

    name: ClassVar[str] = "reasoning"

    benchmark: str | None = None
    data: Path | None = None
    question_field: str | None = None
    answer_field: str | None = None
    samples: int | None = None
    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 32768
    seed: int = 1
    limit: int | None = None
    chat: bool = True

    def __post_init__(self) -> None:
        if self.benchmark is None:
            object.__setattr__(self, "benchmark", "aime24" if self.data is None else OWN)
        if self.benchmark not in BENCHMARKS:
            known = nearest(str(self.benchmark), BENCHMARKS)
            raise ConfigError(f"benchmark = '{self.benchmark}' is not known{known}")
        if self.benchmark == OWN and self.data is None:
            raise ConfigError("benchmark = 'own' has no questions; give data=FILE.jsonl")
        if self.samples is None:
            object.__setattr__(self, "samples", BENCHMARKS[self._benchmark].samples)
        check_whole("samples", self.samples, least=1)
        check_whole("max_new_tokens", self.max_new_tokens, least=1)
        if self.limit is not None:
            check_whole("limit", self.limit, least=1)
        sampling = SamplingParams(**{name: getattr(self, name) for name in _SAMPLING})
        if sampling.greedy and self._samples > 1:
            raise ConfigError(
                f"samples = {self.samples}, but with temperature = 0 all are the same; use "
                "samples=1, or a temperature above 0"
            )

    @property
    def _benchmark(self) -> str:
        assert self.benchmark is not None
        return self.benchmark

    @property
    def _samples(self) -> int:
        assert self.samples is not None
        return self.samples

    @property
    def _is_choice(self) -> bool:
        return BENCHMARKS[self._benchmark].is_choice

    @cached_property
    def _math(self) -> MathJudge:
        return MathJudge()

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides what is asked and what counts; the questions have a fingerprint."""
        values = dataclasses.asdict(self)
        return values | {"data": "hub" if self.data is None else "files"}

    def items(self) -> list[Item]:
        """Every sample of every question; those of one question follow one another.

        Their prompt is the same, so an engine that batches neighbours reads it once.

        Raises:
            DataError: questions that are missing or damaged.
        """
        questions = read_questions(
            self._benchmark,
            self.data,
            question_field=self.question_field,
            answer_field=self.answer_field,
            seed=self.seed,
        )
        items = []
        for number, question in enumerate(questions[: self.limit]):
            first = question_seed(self.seed, question.prompt)
            for sample in range(self._samples):
                sampling = SamplingParams(
                    temperature=self.temperature,
                    top_p=self.top_p,
                    seed=sample_seed(first, sample),
                )
                call = Call(question.prompt, self.max_new_tokens, sampling=sampling, chat=self.chat)
                items.append(Item(f"{number}/{sample}", call, {"answer": question.answer}))
        return items

    def judge(self, item: Item, answer: Answer) -> dict[str, Any]:
        """Whether it is right, the answer as written, whether in a box; `judge_error` if any."""
        gold = item.gold["answer"]
        if self._is_choice:
            verdict = judge_choice(answer.text, gold)
        else:
            verdict = self._math.judge(answer.text, gold)
        judged = {"correct": verdict.correct, "answer": verdict.answer, "boxed": verdict.boxed}
        return judged if verdict.error is None else judged | {"judge_error": verdict.error}

    def summarise(
        self, items: Sequence[Item], records: Records
    ) -> tuple[dict[str, Metric], dict[str, Any]]:
        """Shares over samples, averaged over questions, and lengths in tokens.

        pass@K: of K samples one is right (unbiased estimate); pass@1 is the share of right samples.
        boxed_pass@1: only what is in a box counts, where pass@1 takes other answers too.
        maj@K: the most frequent answer of K samples is right, over groups of K successive ones;
            answers that mean the same are one, and of equally frequent ones the first counts.
        boxed, no_answer, cut_off: with a box, without any answer, ended by the limit.
        """
        questions: dict[str, list[Mapping[str, Any]]] = {}
        for item in items:
            questions.setdefault(item.key.partition("/")[0], []).append(records[item.key])

        def share(value: str) -> Metric:
            return mean_of_groups(
                {name: [_VALUES[value](one) for one in group] for name, group in questions.items()}
            )

        metrics = {"pass@1": share("correct"), "boxed_pass@1": share("boxed_correct")}
        samples = {
            name: [Sample(bool(one["correct"]), one["answer"]) for one in group]
            for name, group in questions.items()
        }
        votes = {name: classes(group, self._same) for name, group in samples.items()}
        for k in powers_of_two(self._samples):
            metrics[f"pass@{k}"] = mean_of_groups(
                {
                    name: [pass_at(k, len(group), sum(one.correct for one in group))]
                    for name, group in samples.items()
                }
            )
        for k in sorted({*powers_of_two(self._samples), self._samples} - {1}):
            metrics[f"maj@{k}"] = mean_of_groups(
                {name: [majority_at(k, group, votes[name])] for name, group in samples.items()}
            )
        metrics |= {name: share(name) for name in ("boxed", "no_answer", "cut_off")}
        everything = [record for group in questions.values() for record in group]
        lengths = [record["num_tokens"] for record in everything]
        metrics["tokens_mean"] = share("tokens")
        for name, part in (("tokens_median", 0.5), ("tokens_p95", 0.95)):
            metrics[name] = Metric(quantile(lengths, part), None, len(questions))
        details = {
            "judge_errors": sum("judge_error" in record for record in everything),
            "questions": {
                name: {
                    "correct": sum(one.correct for one in group),
                    "samples": len(group),
                    "answers": len({vote for vote in votes[name] if vote is not None}),
                }
                for name, group in samples.items()
            },
            "lengths": by_length(everything),
        }
        return metrics, details

    def evaluate(
        self, backend: Backend, out: Path, *, on_progress: Progress | None = None
    ) -> Result:
        """The result, written to OUT/result.json; see `run_suite`, whose errors it raises.

        Raises:
            MissingPackage: math-verify is not installed (before anything is asked).
        """
        if self._is_choice:
            return run_suite(_Settled(self), backend, out, on_progress=on_progress)
        try:
            self._math.require()
            return run_suite(_Settled(self), backend, out, on_progress=on_progress)
        finally:
            self._math.close()

    def pictures(self, result: Result) -> dict[str, Figure]:
        """How long the answers are, and how many of each length are right.

        Raises:
            MissingPackage: matplotlib is not installed.
        """
        bins = result.details["lengths"]
        middles = [(one["from"] + one["to"]) / 2 for one in bins]
        total = sum(one["samples"] for one in bins)
        filled = [(x, one) for x, one in zip(middles, bins, strict=True) if one["samples"]]
        panels = [
            Panel(
                "Share of all answers (%)",
                "length of the answer (tokens)",
                [
                    Curve("all", middles, [100 * one["samples"] / total for one in bins]),
                    Curve("right", middles, [100 * one["correct"] / total for one in bins]),
                ],
                y_from_zero=True,
            ),
            Panel(
                "Right among answers of that length (%)",
                "length of the answer (tokens)",
                [
                    Curve(
                        "right",
                        [x for x, _ in filled],
                        [100 * one["correct"] / one["samples"] for _, one in filled],
                    )
                ],
                lines={"all lengths": 100 * sum(one["correct"] for one in bins) / total},
                y_from_zero=True,
                y_top=103,
            ),
        ]
        model = result.model.get("name", "model")
        caption = f"{model}, {result.settings['benchmark']}: {total:,} answers."
        return {"lengths": draw_panels(panels, caption)}

    def _same(self, one: str, other: str) -> bool:
        return one == other if self._is_choice else self._math.same(one, other)[0]


_VALUES: dict[str, Any] = {
    "correct": lambda record: float(record["correct"]),
    "boxed_correct": lambda record: float(record["correct"] and record["boxed"]),
    "boxed": lambda record: float(record["boxed"]),
    "no_answer": lambda record: float(record["answer"] is None),
    "cut_off": lambda record: float(record["finish_reason"] == "length"),
    "tokens": lambda record: float(record["num_tokens"]),
}


class _Settled:
    """The suite with its settings taken once."""

    def __init__(self, suite: ReasoningSuite) -> None:
        self.name, self.settings = suite.name, suite.settings
        self.items, self.judge, self.summarise = suite.items, suite.judge, suite.summarise
