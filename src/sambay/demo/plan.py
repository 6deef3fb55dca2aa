"""How long to train: as many tokens as the slower model manages in the given minutes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from sambay.files import write_json
from sambay.model import LanguageModel
from sambay.speed import compare_training
from sambay.train.config import RunConfig, read_run_config

PLAN_FILE = "plan.json"
_EPOCHS = 3  # on a fast machine the text ends before the minutes do
_SHARE = 0.85  # of the minutes; the rest is evaluation, checkpoints and a machine that slows down


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
    folder: Path, minutes: float, recipes: dict[str, RunConfig], training_tokens: int
) -> Plan:
    """A plan from measured training speed, written to `folder` for the next time."""
    models = {name: LanguageModel(recipe.model) for name, recipe in recipes.items()}
    first = next(iter(recipes.values()))
    rates = compare_training(
        models,
        batch_size=first.batch.micro_batch_size,
        sequence_length=first.data.sequence_length,
    )
    tokens = min(60 * minutes * _SHARE * min(rates.values()), _EPOCHS * training_tokens)
    steps = max(20, round(tokens / first.tokens_per_step))
    plan = Plan(minutes, steps * first.tokens_per_step, max(1, steps // 8))
    write_json(folder / PLAN_FILE, dataclasses.asdict(plan))
    return plan
