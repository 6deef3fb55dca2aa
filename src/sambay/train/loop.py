"""Training, from top to bottom: open, continue or begin, step, measure, save, export."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sambay.data.batches import Batch, num_windows, read_batch
from sambay.data.manifest import TRAIN, VALIDATION
from sambay.data.sampler import sample_indices
from sambay.data.shards import TokenDataset
from sambay.errors import SambayError
from sambay.model import LanguageModel, initialise
from sambay.model.folder import TOKENIZER_FILES, save_model_folder
from sambay.train.checkpoint import CheckpointStore, Progress, check_same_run, restore
from sambay.train.config import Device, Precision, RunConfig
from sambay.train.display import Display
from sambay.train.evaluate import Evaluation, evaluate
from sambay.train.interrupt import StopRequest
from sambay.train.loss import IGNORE, cross_entropy
from sambay.train.metrics import MetricsLog
from sambay.train.optim import (
    build_optimizer,
    clip_gradients,
    first_nonfinite_gradient,
    set_learning_rate,
)
from sambay.train.plan import check_data, checkpoint_bytes
from sambay.train.run_dir import MODEL, claimed, require_disk_space, start_afresh, write_head
from sambay.train.schedule import learning_rate


class TrainingDiverged(SambayError):
    """The loss or a gradient is no longer a number; the last checkpoint is untouched."""


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    stopped_by: the signal that ended it early, None if all steps are done.
    evaluation: the last one of this call; None if it had nothing left to do.
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

    Raises:
        SambayError: data, directory or checkpoint do not fit (before any work), the disk is full,
            or training diverged (after which the last checkpoint is still there).
    """
    check_data(config)
    training = TokenDataset.open(config.data.directory, TRAIN)
    validation = TokenDataset.open(config.data.directory, VALIDATION)
    if config.data.verify:
        training.verify()
        validation.verify()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with claimed(run_dir):
        if fresh:
            start_afresh(run_dir)
        return _Run(config, run_dir, training, validation, display or Display()).go(change_schedule)


class _Run:
    """One call of `train`: the parts that all its stages need."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        training: TokenDataset,
        validation: TokenDataset,
        display: Display,
    ) -> None:
        self.config, self.run_dir, self.display = config, run_dir, display
        self.training, self.validation = training, validation
        self.num_samples = num_windows(training, config.data.sequence_length)
        self.store = CheckpointStore(run_dir, config.checkpoint)

    def go(self, change_schedule: bool) -> Outcome:
        config, store, manifest_hash = self.config, self.store, self.training.manifest_hash
        store.clean()
        latest = store.latest()
        if latest is not None:
            check_same_run(latest, config, manifest_hash, change_schedule=change_schedule)
        require_disk_space(self.run_dir, checkpoint_bytes(config), config.checkpoint.keep)
        write_head(self.run_dir, config, self.training.folder)

        self.model = LanguageModel(config.model)
        initialise(self.model, scheme=config.init_scheme, seed=config.seed)
        self.model.activation_checkpointing = config.activation_checkpointing
        self.model.to(_device(config))
        self.optimizer = build_optimizer(self.model, config.optimizer)
        progress = Progress()
        if latest is not None:
            progress = restore(latest, self.model, self.optimizer)
            self.display.message(f"continuing from {latest}")

        outcome = self._steps(progress)
        is_complete = outcome.progress.step >= config.num_steps
        if is_complete and (outcome.evaluation or not (self.run_dir / MODEL).exists()):
            tokenizer_file = self.run_dir / TOKENIZER_FILES[0]
            save_model_folder(self.run_dir / MODEL, self.model, tokenizer_file)
        return outcome

    def _steps(self, progress: Progress) -> Outcome:
        config, num_steps = self.config, self.config.num_steps
        evaluation = None
        with (
            MetricsLog(
                self.run_dir, last_step=progress.step, tensorboard=config.logging.tensorboard
            ) as metrics,
            StopRequest() as stop,
        ):
            while progress.step < num_steps and stop.signal_number is None:
                started = time.perf_counter()
                rate = learning_rate(config, progress.step)
                loss, norm = self._update(progress.step, rate)
                seconds = time.perf_counter() - started
                progress = Progress(
                    step=progress.step + 1,
                    tokens=progress.tokens + config.tokens_per_step,
                    seconds=progress.seconds + seconds,
                )
                step = progress.step
                self.display.step(step, num_steps, config.tokens_per_step, seconds, loss)

                values: dict[str, float] = {}
                if step % config.logging.every_steps == 0 or step == num_steps:
                    values |= {
                        "tokens": progress.tokens,
                        "seconds": round(progress.seconds, 3),
                        "loss": loss,
                        "learning_rate": rate,
                        "gradient_norm": norm,
                        "tokens_per_second": round(config.tokens_per_step / seconds, 1),
                    }
                if step % config.evaluation.every_steps == 0 or step == num_steps:
                    evaluation = evaluate(self._batch_loss, self.validation, config)
                    values |= {
                        "tokens": progress.tokens,
                        "seconds": round(progress.seconds, 3),
                        "validation_loss": evaluation.loss,
                        "validation_bits_per_byte": evaluation.bits_per_byte,
                    }
                    self.display.message(
                        f"step {step}: validation loss {evaluation.loss:.4f}, "
                        f"{evaluation.bits_per_byte:.4f} bits/byte"
                    )
                if values:
                    metrics.write(step, values)
                is_last = step == num_steps or stop.signal_number is not None
                if step % config.checkpoint.every_steps == 0 or is_last:
                    metrics.flush_to_disk()
                    self._save(progress)
            self.display.close()
            return Outcome(progress, stop.signal_number, evaluation)

    def _update(self, step: int, rate: float) -> tuple[float, float]:
        """One optimiser step; the loss in nats per token and the gradient norm before clipping."""
        config = self.config
        indices = sample_indices(
            config.seed, step, config.batch.global_batch_size, self.num_samples
        )
        batch = read_batch(
            self.training,
            indices,
            config.data.sequence_length,
            segments=config.data.separate_documents,
        )
        num_tokens = int((batch.labels != IGNORE).sum())
        nats = 0.0
        for part in _micro_batches(batch, config.batch.micro_batch_size):
            part_nats = self._batch_loss(part)
            (part_nats / num_tokens).backward()  # each token weighs the same in every split
            nats += float(part_nats.detach())
        loss = nats / num_tokens
        norm = clip_gradients(self.model.parameters(), config.optimizer.clip_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingDiverged(self._diagnosis(step, rate, loss, norm))
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def _batch_loss(self, batch: Batch) -> Tensor:
        """The summed cross-entropy of a batch, in nats, float32."""
        device = self.model.head_weight.device
        is_bf16 = self.config.precision is Precision.BF16
        segments = None if batch.segments is None else batch.segments.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
            h_BTD = self.model.hidden_states(batch.input_ids.to(device), segments=segments)
        if is_bf16:
            h_BTD = h_BTD.bfloat16()
        return cross_entropy(h_BTD, self.model.head_weight, batch.labels.to(device))

    def _save(self, progress: Progress) -> None:
        self.store.save(
            progress, self.model, self.optimizer, self.config, self.training.manifest_hash
        )

    def _diagnosis(self, step: int, rate: float, loss: float, norm: float) -> str:
        name = first_nonfinite_gradient(self.model)
        where = f", first in the gradient of {name}" if name else ""
        latest = self.store.latest()
        kept = f"the last checkpoint is {latest}" if latest else "there is no checkpoint yet"
        return (
            f"step {step + 1}: the loss is {loss:g} and the gradient norm {norm:g}{where}, at "
            f"learning rate {rate:.3g}; {kept}; lower optimizer.peak_learning_rate (with "
            "--change-schedule to continue, or in another --run-dir)"
        )


def _micro_batches(batch: Batch, size: int) -> list[Batch]:
    segments = batch.segments
    return [
        Batch(
            batch.input_ids[start : start + size],
            batch.labels[start : start + size],
            None if segments is None else segments[start : start + size],
        )
        for start in range(0, batch.input_ids.shape[0], size)
    ]


def _device(config: RunConfig) -> torch.device:
    if config.device is Device.AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.device is Device.CUDA and not torch.cuda.is_available():
        raise SambayError("device = 'cuda', but torch sees no CUDA device; use device=auto")
    return torch.device(config.device.value)
