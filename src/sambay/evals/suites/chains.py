"""Chained assignments: whether a model follows a chain of look-ups to its end, by its length."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sambay.errors import ConfigError
from sambay.evals.calls import Answer, Backend, Call
from sambay.evals.chains import END, answer, puzzle, question
from sambay.evals.result import Result
from sambay.evals.runner import Item, Progress, run_suite
from sambay.evals.statistics import Metric, mean
from sambay.plots.evaluation import EvaluationChart, EvaluationCurve, draw_evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "chains"
_TOKENS_PER_STEP = 8  # more than any tokenizer needs for a blank, a letter and a digit


@dataclass(frozen=True)
class ChainsSuite:
    """Puzzles of `lines` assignments, of which a chain of each of `steps` is asked for.

    The other assignments form chains of 1 to `other_steps`. An answer is right if it is the whole
    chain and ends there; `followed` counts those that begin with the whole chain, whatever comes
    behind, and `final_accuracy` those that end with the right variable however they got there.
    """

    steps: tuple[int, ...] = (1, 2, 4, 8, 16)
    lines: int = 32
    other_steps: int = 8
    prompts: int = 128
    seed: int = 42

    def __post_init__(self) -> None:
        if not self.steps or min(self.steps) < 1:
            raise ConfigError(f"steps = {self.steps}; give numbers of at least 1")
        if len(set(self.steps)) < len(self.steps):
            raise ConfigError(f"steps = {self.steps}; give each number once")
        for name in ("prompts", "other_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}; it must be 1 or more")
        if max(self.steps) > self.lines:
            raise ConfigError(
                f"steps = {self.steps} with lines = {self.lines}; a chain has no more steps than "
                "there are lines"
            )

    @property
    def name(self) -> str:
        """The suite's name."""
        return NAME

    @property
    def settings(self) -> dict[str, Any]:
        """All options, JSON-ready."""
        return asdict(self) | {"steps": list(self.steps)}

    def items(self) -> list[Item]:
        """`prompts` puzzles for each number of steps."""
        return [self._item(steps, number) for steps in self.steps for number in range(self.prompts)]

    def judge(self, item: Item, answer: Answer) -> dict[str, Any]:
        """Right if the first line of the answer is the chain; and how far it was followed."""
        chain = item.gold["chain"]
        said = answer.text.partition("\n")[0].removesuffix(END).split("=")
        right = chain[1:]
        followed = 0
        while followed < min(len(said), len(right)) and said[followed] == right[followed]:
            followed += 1
        is_complete = said == right and answer.text.partition("\n")[0].endswith(END)
        return {
            "correct": is_complete,
            "final_is_right": bool(said) and said[-1] == right[-1],
            "steps_followed": followed,
        }

    def summarise(
        self, items: Sequence[Item], records: Mapping[str, Mapping[str, Any]]
    ) -> tuple[dict[str, Metric], dict[str, Any]]:
        """Accuracy for each number of steps, and the length of the answers in tokens."""
        metrics: dict[str, Metric] = {}
        followed: dict[str, Metric] = {}
        finals: dict[str, Metric] = {}
        curve = []
        for steps in self.steps:
            mine = [records[item.key] for item in items if item.gold["steps"] == steps]
            accuracy = mean([float(record["correct"]) for record in mine])
            metrics[f"accuracy@{steps}"] = accuracy
            followed[f"followed@{steps}"] = mean(
                [float(record["steps_followed"] == steps) for record in mine]
            )
            finals[f"final_accuracy@{steps}"] = mean([float(r["final_is_right"]) for r in mine])
            curve.append(
                {
                    "steps": steps,
                    "accuracy": accuracy.value,
                    "stderr": accuracy.stderr,
                    "mean_tokens": mean([record["num_tokens"] for record in mine]).value,
                    "mean_steps_followed": mean([r["steps_followed"] for r in mine]).value,
                }
            )
        return metrics | followed | finals, {"curve": curve}

    def evaluate(
        self, backend: Backend, out: Path, *, on_progress: Progress | None = None
    ) -> Result:
        """The result, continued from what OUT holds; see `run_suite`."""
        return run_suite(self, backend, out, on_progress=on_progress)

    def pictures(self, result: Result) -> dict[str, Figure]:
        """Accuracy against the number of steps."""
        return {"chains": draw_steps([result])}

    def _item(self, steps: int, number: int) -> Item:
        generator = random.Random(f"chains {self.seed} {self.lines} {steps} {number}")
        others: list[int] = []
        while (left := self.lines - steps - sum(others)) > 0:
            others.append(min(generator.randint(1, self.other_steps), left))
        made = puzzle(generator, [steps, *others])
        chain = made.chains[0]
        examples = "".join(f"{question(one)}{answer(one)}\n" for one in made.chains[1:2])
        return Item(
            key=f"{steps}/{number}",
            call=Call(
                prompt=made.text + examples + question(chain),
                max_new_tokens=_TOKENS_PER_STEP * (steps + 2),
                stop=("\n",),
            ),
            gold={"steps": steps, "chain": list(chain)},
        )


def draw_steps(results: Sequence[Result], *, labels: Sequence[str] | None = None) -> Figure:
    """Accuracy against the steps of the chain, a curve for each result.

    Raises:
        ConfigError: results of another suite, or that asked different questions.
        MissingPackage: matplotlib is not installed.
    """
    if any(result.suite != NAME for result in results):
        raise ConfigError(f"a result is not of the suite {NAME}; leave it out")
    if len({result.items_sha256 for result in results}) > 1:
        raise ConfigError("the results answer different questions; evaluate with one setting")
    names = labels or [str(result.model.get("name", "model")) for result in results]
    curves = []
    for name, result in zip(names, results, strict=True):
        points = result.details["curve"]
        bars = [point["stderr"] or 0.0 for point in points]
        y = [point["accuracy"] for point in points]
        curves.append(
            EvaluationCurve(
                name,
                x=[point["steps"] for point in points],
                y=y,
                low=[value - bar for value, bar in zip(y, bars, strict=True)],
                high=[value + bar for value, bar in zip(y, bars, strict=True)],
            )
        )
    settings = results[0].settings
    tokens = [point["mean_tokens"] for result in results for point in result.details["curve"]]
    chart = EvaluationChart(
        title=f"Chained assignments among {settings['lines']} lines",
        x_label=f"steps to write (answers of up to {max(tokens):.0f} tokens)",
        curves=curves,
        x_ticks={steps: str(steps) for steps in settings["steps"]},
        x_is_logarithmic=True,
    )
    return draw_evaluation(
        chart, f"{settings['prompts']} puzzles at each point; bars: one standard error"
    )
