"""Training, from top to bottom: check, begin or continue, step, measure, save, export."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sambay.data.batch_source import BatchSource
from sambay.errors import SambayError
from sambay.generate.memory import available_bytes, readable_bytes
from sambay.model.folder import TOKENIZER_FILE, save_model_folder
from sambay.train.checkpoint import CheckpointStore, Progress, check_same_run, restore
from sambay.train.config import RunConfig
from sambay.train.data_checks import check_data
from sambay.train.display import Display
from sambay.train.evaluate import Evaluation, evaluate_all
from sambay.train.interrupt import StopRequest
from sambay.train.metrics import MetricsLog
from sambay.train.plan import checkpoint_bytes, memory_estimate
from sambay.train.run_dir import MODEL, claimed, require_disk_space, start_afresh, write_head
from sambay.train.schedule import learning_rate
from sambay.train.sources import ValidationSet, open_batches, open_validation, source_metrics
from sambay.train.trainer import NotFinite, Trainer


class TrainingDiverged(SambayError):
    """The loss or a gradient is no longer a number; the last checkpoint is untouched."""


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

    A run that was interrupted anywhere ends with the same numbers, bit for bit on the CPU, as one
    that was not: the batch of a step is a function of seed and step alone.

    fresh: remove the run that is there and begin again.
    change_schedule: continue although `optimizer`, `schedule` or `regularisation` differ from the
        checkpoint's.

    Raises:
        SambayError: data, directory or checkpoint do not fit (before any work), the disk is full,
            or training diverged (after which the last checkpoint is still there).
    """
    display = display or Display()
    check_data(config)
    batches = open_batches(config)
    validation = open_validation(config, batches)
    if config.data.verify:
        for dataset in (*batches.datasets, *(one.dataset for one in validation)):
            dataset.verify()
    if config.threads is not None:
        torch.set_num_threads(config.threads)

    with claimed(run_dir):
        if fresh:
            start_afresh(run_dir)
        store = CheckpointStore(run_dir, config.checkpoint)
        store.clean()
        latest, manifest_hash = store.latest(), batches.manifest_hash
        if latest is not None:
            check_same_run(latest, config, manifest_hash, change_schedule=change_schedule)
        require_disk_space(run_dir, checkpoint_bytes(config), config.checkpoint.keep)
        write_head(run_dir, config, batches.datasets[0].folder)

        trainer = Trainer(config)
        _warn_of_memory(config, trainer, display)
        progress = Progress()
        if latest is not None:
            progress = restore(latest, trainer.model, trainer.optimizer)
            display.message(f"continuing from {latest}")

        evaluation, signal_number = None, None
        if progress.step < config.num_steps:
            run = _Steps(config, run_dir, batches, validation, store, display)
            progress, evaluation, signal_number = run.go(trainer, progress)
        if progress.step < config.num_steps:
            return Outcome(progress, signal_number, evaluation)
        if evaluation is not None or not (run_dir / MODEL).exists():
            save_model_folder(run_dir / MODEL, trainer.model, run_dir / TOKENIZER_FILE)
        return Outcome(progress, None, evaluation)


@dataclass
class _Steps:
    """The steps of one call, between opening the run and exporting its model."""

    config: RunConfig
    run_dir: Path
    batches: BatchSource
    validation: list[ValidationSet]
    store: CheckpointStore
    display: Display

    def go(
        self, trainer: Trainer, progress: Progress
    ) -> tuple[Progress, Evaluation | None, int | None]:
        """Where it ended, the last evaluation, and the signal that ended it, if one did."""
        config, num_steps = self.config, self.config.num_steps
        evaluation, saved_step = None, progress.step
        tensorboard = config.logging.tensorboard
        with (
            MetricsLog(self.run_dir, last_step=saved_step, tensorboard=tensorboard) as metrics,
            StopRequest() as stop,
        ):
            while progress.step < num_steps and stop.signal_number is None:
                started = time.perf_counter()
                rate = learning_rate(config, progress.step)
                batch = self.batches.batch(progress.step)
                try:
                    learned = trainer.learn(batch, rate, progress.step)
                except NotFinite as error:
                    raise TrainingDiverged(self._diagnosis(progress.step, rate, error)) from error
                seconds = time.perf_counter() - started

                step = progress.step + 1
                progress = Progress(
                    step, progress.tokens + config.tokens_per_step, progress.seconds + seconds
                )
                self.display.step(step, num_steps, config.tokens_per_step, seconds, learned.loss)
                is_final = step == num_steps
                values: dict[str, float] = {}
                if step % config.logging.every_steps == 0 or is_final:
                    values |= {
                        "loss": learned.loss,
                        "learning_rate": rate,
                        "gradient_norm": learned.gradient_norm,
                        "tokens_per_second": config.tokens_per_step / seconds,
                    }
                    values |= source_metrics(self.batches, step)
                    if config.regularisation.changes_objective:
                        values["objective"] = learned.objective
                if step % config.evaluation.every_steps == 0 or is_final:
                    evaluation = self._evaluate(trainer, step)
                    values |= evaluation.metrics()
                if values:
                    metrics.write({**asdict(progress), **values})
                if step % config.checkpoint.every_steps == 0:
                    saved_step = self._save(trainer, progress, metrics)
            if saved_step != progress.step:  # the end, or a signal at any moment before this line
                self._save(trainer, progress, metrics)
            self.display.close()
            return progress, evaluation, stop.signal_number

    def _evaluate(self, trainer: Trainer, step: int) -> Evaluation:
        evaluation = evaluate_all(trainer.loss, self.validation, self.config)
        self.display.message(
            f"step {step}: validation loss {evaluation.loss:.4f}, "
            f"{evaluation.bits_per_byte:.4f} bits/byte"
        )
        return evaluation

    def _save(self, trainer: Trainer, progress: Progress, metrics: MetricsLog) -> int:
        """Save a checkpoint after the metrics that lead to it; the step saved."""
        metrics.flush_to_disk()
        self.store.save(
            progress, trainer.model, trainer.optimizer, self.config, self.batches.manifest_hash
        )
        return progress.step

    def _diagnosis(self, step: int, rate: float, error: NotFinite) -> str:
        latest = self.store.latest()
        kept = f"the last checkpoint is {latest}" if latest else "there is no checkpoint yet"
        return (
            f"step {step + 1}: {error}, at learning rate {rate:.3g}; {kept}; lower "
            "optimizer.peak_learning_rate (with --change-schedule to continue, or in another "
            "--run-dir)"
        )


def _warn_of_memory(config: RunConfig, trainer: Trainer, display: Display) -> None:
    estimate = memory_estimate(config)
    needed = estimate.total - estimate.weights  # the weights exist already
    available = available_bytes(trainer.device)
    if available is not None and needed > available:
        display.message(
            f"warning: training needs about {readable_bytes(needed)} more memory, "
            f"{readable_bytes(available)} are available; lower batch.micro_batch_size or set "
            "activation_checkpointing=true"
        )
