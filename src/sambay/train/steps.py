"""The steps of a run: learn, measure, save, and stop or turn back where something is wrong."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from sambay.data.batch_source import BatchSource
from sambay.files import WriteFailed
from sambay.train.checkpoint import CheckpointStore, Progress, restore
from sambay.train.config import OnExceed, RunConfig
from sambay.train.display import Display
from sambay.train.distributed import ToldByAnother, World
from sambay.train.environment import record_start
from sambay.train.evaluate import Evaluation, evaluate_all
from sambay.train.interrupt import StopRequest
from sambay.train.metrics import MetricsLog
from sambay.train.norms import learning_rate_metrics, role_norm_metrics
from sambay.train.resilience import TrainingDiverged, is_usable, remember
from sambay.train.schedule import learning_rate
from sambay.train.sinks import SinkRun, open_sinks
from sambay.train.sources import ValidationSet, source_metrics
from sambay.train.throughput import Gauges
from sambay.train.trainer import Learned, Trainer
from sambay.train.watchdog import Watchdog

_FAILED = signal.NSIG  # above all signals, where processes agree why to stop


@dataclass(frozen=True)
class Run:
    """What a run works with."""

    config: RunConfig
    run_dir: Path
    batches: BatchSource
    validation: list[ValidationSet]
    world: World
    display: Display


class Steps:
    """The steps of one call, between opening the run and exporting its model."""

    def __init__(self, run: Run, trainer: Trainer, watchdog: Watchdog) -> None:
        self.run, self.config, self.world = run, run.config, run.world
        self.trainer, self.watchdog = trainer, watchdog
        self.store = CheckpointStore(run.run_dir, run.config.checkpoint, run.world)
        self.gauges = Gauges(run.config, run.world)
        self.evaluation: Evaluation | None = None

    def go(self, progress: Progress) -> tuple[Progress, int | None]:
        """Where it ended, and the signal that ended it, if one did."""
        run_id = self._record_start(progress.step)
        with (
            StopRequest(insistent=self.world.mesh is None) as stop,
            self._finished_checkpoint(),
        ):
            while True:
                with self._log(progress.step, run_id) as metrics:
                    progress, has_ended = self._until_trouble(progress, stop, metrics)
                if has_ended:
                    self.store.wait()
                    self.run.display.close()
                    return progress, stop.signal_number

    def _until_trouble(
        self, progress: Progress, stop: StopRequest, metrics: MetricsLog | None
    ) -> tuple[Progress, bool]:
        """Where to go on, and whether that is the end; if not, the run has just turned back."""
        config, world = self.config, self.world
        saved_step = progress.step
        bad_steps, problem = 0, ""
        failure: WriteFailed | None = None
        while progress.step < config.num_steps:
            self.watchdog.at("between steps", progress.step)
            self._agree_to_go_on(stop, failure)
            if stop.signal_number is not None:
                break
            started = time.perf_counter()
            batch_number = progress.step + progress.batch_offset
            rate = learning_rate(config, progress.step)
            self.watchdog.at("reading the batch")
            batch = self.run.batches.batch(batch_number, world.rows(config.batch.global_batch_size))
            learned = self.trainer.gradients(batch, progress.step)
            is_used = is_usable(learned, progress.recent_losses, config.resilience)
            # Before they are clipped or forgotten.
            norms = role_norm_metrics(self.trainer.model) if self._logs(progress.step + 1) else {}
            if is_used:
                self.trainer.update(rate, learned)
                bad_steps = 0
            else:
                problem = self.trainer.discard(learned)
                bad_steps += 1
                if bad_steps > config.resilience.max_skips:
                    return self._turn_back(progress, rate, problem, bad_steps), False
                self.run.display.message(f"step {progress.step + 1} skipped: {problem}")
            seconds = time.perf_counter() - started
            progress = self._after(progress, learned, seconds, is_used=is_used)
            values = self._measure(progress, learned, rate, seconds, norms)
            if values and metrics is not None:
                try:
                    metrics.write(values)
                except WriteFailed as error:  # told to the others before the next step
                    failure = error
            # While steps are skipped nothing is saved: what to turn back to lies before them.
            if progress.step % config.checkpoint.every_steps == 0 and bad_steps == 0:
                saved_step = self._save(progress, metrics)
        self._agree_to_go_on(stop, failure)
        # The end, or a signal at any moment before this line.
        if saved_step != progress.step and (bad_steps == 0 or progress.step == config.num_steps):
            self._save(progress, metrics)
        return progress, True

    def _agree_to_go_on(self, stop: StopRequest, failure: WriteFailed | None) -> None:
        """Let a signal or a failure that one process met stop all of them at the same step."""
        mine = _FAILED if failure is not None else stop.signal_number or 0
        code = self.world.max(mine)
        if code == _FAILED:
            raise failure or ToldByAnother("another process could not write; see its message")
        if code:
            stop.signal_number = code

    def _after(
        self, progress: Progress, learned: Learned, seconds: float, *, is_used: bool
    ) -> Progress:
        recent = progress.recent_losses
        return replace(
            progress,
            step=progress.step + 1,
            tokens=progress.tokens + self.config.tokens_per_step,
            seconds=progress.seconds + seconds,
            skipped=progress.skipped + (not is_used),
            recent_losses=(
                remember(recent, learned.loss, self.config.resilience) if is_used else recent
            ),
        )

    def _measure(
        self,
        progress: Progress,
        learned: Learned,
        rate: float,
        seconds: float,
        norms: dict[str, float],
    ) -> dict[str, float]:
        """What to log after a step; nothing for most steps, if so configured."""
        config, step = self.config, progress.step
        self.run.display.step(step, config.num_steps, config.tokens_per_step, seconds, learned.loss)
        is_final = step == config.num_steps
        values: dict[str, float] = {}
        if self._logs(step):
            values |= {"loss": learned.loss, "gradient_norm": learned.gradient_norm} | norms
            values |= learning_rate_metrics(self.trainer.model, self.trainer.optimizer, rate)
            values |= self.gauges.metrics(seconds)
            values |= source_metrics(self.run.batches, step + progress.batch_offset)
            if config.regularisation.changes_objective:
                values["objective"] = learned.objective
        if step % config.evaluation.every_steps == 0 or is_final:
            self.evaluation = self._evaluate(step)
            values |= self.evaluation.metrics()
        if not values:
            return {}
        head = {"step": step, "tokens": progress.tokens, "seconds": progress.seconds}
        counts = {"skipped": progress.skipped, "rewinds": progress.rewinds}
        return head | {name: count for name, count in counts.items() if count} | values

    def _logs(self, step: int) -> bool:
        return step % self.config.logging.every_steps == 0 or step == self.config.num_steps

    def _evaluate(self, step: int) -> Evaluation:
        evaluation = evaluate_all(self.trainer.loss, self.run.validation, self.config)
        self.run.display.message(
            f"step {step}: validation loss {evaluation.loss:.4f}, "
            f"{evaluation.bits_per_byte:.4f} bits/byte"
        )
        return evaluation

    def _save(self, progress: Progress, metrics: MetricsLog | None) -> int:
        """Save a checkpoint after the metrics that lead to it; the step saved."""
        self.watchdog.at("saving")
        self.world.on_main(lambda: None if metrics is None else metrics.flush_to_disk())
        self.store.save(
            progress,
            self.trainer.model,
            self.trainer.optimizer,
            self.config,
            self.run.batches.manifest_hash,
        )
        return progress.step

    def _turn_back(self, progress: Progress, rate: float, problem: str, bad: int) -> Progress:
        """The last checkpoint's progress, from where the run goes on with batches not yet seen.

        Raises:
            TrainingDiverged: it shall not turn back, cannot, or did too often.
        """
        settings = self.config.resilience
        self.store.wait()
        latest = self.world.on_main(self.store.latest)
        kept = f"the last checkpoint is {latest}" if latest else "there is no checkpoint yet"
        rewinds = progress.rewinds + 1
        if settings.on_exceed is OnExceed.STOP or latest is None or rewinds > settings.max_rewinds:
            run_of = f" ({bad} steps in a row could not be used)" if bad > 1 else ""
            again = f", after {progress.rewinds} rewinds" if progress.rewinds else ""
            raise TrainingDiverged(
                f"step {progress.step + 1}: {problem}{run_of}{again}, at learning rate {rate:.3g}; "
                f"{kept}; lower optimizer.peak_learning_rate (with --change-schedule to continue, "
                "or in another --run-dir)"
            )
        restored = restore(latest, self.trainer.model, self.trainer.optimizer, self.world)
        self.run.display.message(
            f"step {progress.step + 1}: {problem}; going back to {latest} and on with other data"
        )
        return replace(
            restored,
            rewinds=rewinds,
            batch_offset=progress.batch_offset + progress.step + 1 - restored.step,
            seconds=progress.seconds,
        )

    def _record_start(self, step: int) -> str:
        """Write down where this call computes; what the run is known by."""
        run_dir = self.run.run_dir
        return self.world.on_main(
            lambda: record_start(run_dir, self.world, self.gauges, step).run_id
        )

    def _log(
        self, last_step: int, run_id: str
    ) -> contextlib.AbstractContextManager[MetricsLog | None]:
        config, run_dir = self.config, self.run.run_dir
        made: list[MetricsLog] = []

        def make() -> None:
            sinks = open_sinks(SinkRun(run_dir, run_id, config, last_step + 1))
            warn = self.run.display.message
            made.append(MetricsLog(run_dir, last_step=last_step, sinks=sinks, warn=warn))

        self.world.on_main(make)
        return made[0] if made else contextlib.nullcontext()

    @contextlib.contextmanager
    def _finished_checkpoint(self) -> Iterator[None]:
        """Whatever ends the block, a checkpoint that is being written gets its chance."""
        try:
            yield
        except BaseException:
            # Also an interrupt ends a run. What ended it matters more than a save that fails too.
            with contextlib.suppress(Exception):
                self.store.wait(seconds=60.0)
            raise
