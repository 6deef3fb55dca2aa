"""How long to train: as many tokens as the slower model manages in the given minutes."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np

from sambay.data.batches import read_batch
from sambay.data.shards import TokenDataset
from sambay.files import write_json
from sambay.speed import fastest_seconds
from sambay.train.config import RunConfig, read_run_config
from sambay.train.trainer import Trainer

PLAN_FILE = "plan.json"
_EPOCHS = 3  # on a fast machine the text ends before the minutes do
_EVALUATIONS = 6
_EVALUATION_SHARE = 0.2  # of the time at most, unless that were less than two evaluations
_FORWARD_COST = 1 / 3  # of a training step, which is a forward and a backward of twice the work
_SHARE = 0.9  # of the minutes; the rest is checkpoints and a machine that slows down


@dataclasses.dataclass(frozen=True)
class Plan:
    """Tokens per model and the minutes they were planned for; kept, so that runs can be resumed."""

    minutes: float
    total_tokens: int
    eval_every_steps: int

    def overrides(self, data: Path) -> list[str]:
        """The arguments of `sambay train` that make a recipe follow the plan."""
        return [
            f"data.directory={data}",
            f"schedule.total_tokens={self.total_tokens}",
            f"schedule.warmup_tokens={self.total_tokens // 20}",
            f"evaluation.every_steps={self.eval_every_steps}",
            "evaluation.max_tokens=None",
            f"checkpoint.every_steps={self.eval_every_steps * 2}",
            "checkpoint.keep=1",
        ]


def read_plan(folder: Path, minutes: float) -> Plan | None:
    """The plan of an earlier run for the same minutes, if there is one."""
    path = folder / PLAN_FILE
    if not path.exists():
        return None
    plan = Plan(**json.loads(path.read_text()))
    return plan if plan.minutes == minutes else None


def has_other_length(run_dir: Path, plan: Plan) -> bool:
    """Whether the directory holds a run that trains more or fewer tokens than planned."""
    path = run_dir / "config.json"
    return path.exists() and read_run_config(path).schedule.total_tokens != plan.total_tokens


def make_plan(
    folder: Path,
    minutes: float,
    recipes: dict[str, RunConfig],
    training: TokenDataset,
    validation: TokenDataset,
) -> Plan:
    """A plan from the measured speed of real training steps, written to `folder`.

    Both models shall see the same batches, so the slower one decides.
    """
    first = next(iter(recipes.values()))
    seconds = max(_seconds_per_step(recipes, training).values())
    budget = 60 * minutes * _SHARE
    evaluation = validation.num_tokens / first.tokens_per_step * seconds * _FORWARD_COST
    # A slow or busy machine shall spend its minutes on training: fewer points on the curve then.
    evaluations = min(max(int(_EVALUATION_SHARE * budget / evaluation), 2), _EVALUATIONS)
    affordable = (budget - evaluations * evaluation) / seconds
    steps = int(min(affordable, _EPOCHS * training.num_tokens / first.tokens_per_step))
    steps = max(evaluations, steps)
    plan = Plan(minutes, steps * first.tokens_per_step, steps // evaluations)
    write_json(folder / PLAN_FILE, dataclasses.asdict(plan))
    return plan


def _seconds_per_step(recipes: dict[str, RunConfig], training: TokenDataset) -> dict[str, float]:
    steps = {}
    for name, config in recipes.items():
        indices = np.arange(config.batch.global_batch_size)
        batch = read_batch(training, indices, config.data.sequence_length)
        steps[name] = functools.partial(Trainer(config).learn, batch, 1e-5, 0)
    return fastest_seconds(steps)
