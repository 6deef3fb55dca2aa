"""Training, from top to bottom: check, begin or continue, step, measure, save, export."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch

from sambay.data.batch_source import BatchSource
from sambay.generate.memory import available_bytes, readable_bytes
from sambay.train.checkpoint import CheckpointStore, Progress, restore
from sambay.train.config import RunConfig
from sambay.train.cost import Layout, checkpoint_bytes, memory_estimate
from sambay.train.data_checks import check_data
from sambay.train.display import Display, Silence
from sambay.train.distributed import joined
from sambay.train.evaluate import Evaluation
from sambay.train.export import export_model
from sambay.train.layout import sizes_for
from sambay.train.run_dir import (
    MODEL,
    check_writable,
    claimed,
    require_disk_space,
    start_afresh,
    write_head,
)
from sambay.train.same_run import check_same_run
from sambay.train.sinks import require_sinks
from sambay.train.sources import ValidationSet, open_batches, open_validation
from sambay.train.steps import Run, Steps
from sambay.train.trainer import Trainer
from sambay.train.watchdog import Watchdog


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    stopped_by: the signal that ended it early, None if all steps are done.
    evaluation: the last one of this call; None if it made none.
    """

    progress: Progress
    stopped_by: int | None
    evaluation: Evaluation | None


def train(
    config: RunConfig,
    run_dir: Path,
    *,
    fresh: bool = False,
    change_schedule: bool = False,
    display: Display | None = None,
) -> Outcome:
    """What became of the run in `run_dir`, begun or continued from its last checkpoint.

    Started by torchrun, all its processes work on the run together. A run that was interrupted
    anywhere ends with the same numbers, bit for bit on the CPU with as many processes, as one that
    was not: the batch of a step is a function of seed and step alone.

    fresh: remove the run that is there and begin again.
    change_schedule: continue although `optimizer`, `schedule` or `regularisation` differ from the
        checkpoint's.

    Raises:
        SambayError: data, directory or checkpoint do not fit (before any work), the disk is full,
            or training diverged (after which the last checkpoint is still there).
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with joined(config) as world, contextlib.ExitStack() as held:
        batches, validation = world.everywhere(lambda: _open_data(config, verify=world.is_main))
        shown = (display or Display()) if world.is_main else Silence()
        run = Run(config, run_dir, batches, validation, world, shown)

        def prepare() -> Path | None:
            held.enter_context(claimed(run_dir))
            return _prepare(run, fresh=fresh, change_schedule=change_schedule)

        latest = world.on_main(prepare)
        world.everywhere(lambda: check_writable(run_dir))
        with Watchdog(world, config.resilience.hang_seconds) as watchdog:
            return _train(run, latest, watchdog)


def _open_data(config: RunConfig, *, verify: bool) -> tuple[BatchSource, list[ValidationSet]]:
    check_data(config)
    batches = open_batches(config)
    validation = open_validation(config, batches)
    if config.data.verify and verify:
        for dataset in (*batches.datasets, *(one.dataset for one in validation)):
            dataset.verify()
    return batches, validation


def _prepare(run: Run, *, fresh: bool, change_schedule: bool) -> Path | None:
    """Bring the run directory in order; the checkpoint to continue from, if there is one."""
    config, run_dir = run.config, run.run_dir
    require_sinks(config.logging)
    if fresh:
        start_afresh(run_dir)
    store = CheckpointStore(run_dir, config.checkpoint)
    store.clean()
    latest = store.latest()
    if latest is not None:
        check_same_run(latest, config, run.batches.manifest_hash, change_schedule=change_schedule)
    require_disk_space(run_dir, checkpoint_bytes(config), config.checkpoint.keep)
    write_head(run_dir, config, run.batches.datasets[0].folder)
    return latest


def _train(run: Run, latest: Path | None, watchdog: Watchdog) -> Outcome:
    config, world = run.config, run.world
    trainer = Trainer(config, world, watchdog)
    _warn_of_memory(config, trainer, run.display)
    progress = Progress()
    if latest is not None:
        progress = restore(latest, trainer.model, trainer.optimizer, world)
        run.display.message(f"continuing from {latest}")

    evaluation = None
    if progress.step < config.num_steps:
        steps = Steps(run, trainer, watchdog)
        progress, stopped_by = steps.go(progress)
        evaluation = steps.evaluation
        if progress.step < config.num_steps:
            return Outcome(progress, stopped_by, evaluation)

    def export() -> None:
        if evaluation is not None or not (run.run_dir / MODEL).exists():
            export_model(run.run_dir)

    watchdog.at("exporting the model", progress.step)
    world.on_main(export)
    return Outcome(progress, None, evaluation)


def _warn_of_memory(config: RunConfig, trainer: Trainer, display: Display) -> None:
    layout = Layout(*sizes_for(config, trainer.world.size))
    estimate = memory_estimate(config, layout)
    needed = estimate.total - estimate.weights  # the weights exist already
    available = available_bytes(trainer.device)
    if available is not None and needed > available:
        display.message(
            f"warning: training needs about {readable_bytes(needed)} more memory, "
            f"{readable_bytes(available)} are available; lower batch.micro_batch_size or set "
            "activation_checkpointing=full"
        )
