"""Checkpoints: folders that are complete or invisible, and the exact continuation from them.

checkpoints/step-00000100/ holds the weights and both moments of AdamW, cut into pieces by
`torch.distributed.checkpoint` (*.distcp, .metadata), and state.json: how far the run has come, its
configuration, the hashes of the data manifests and the SHA-256 of all files. Whatever the number
of processes, the format is the same. All random numbers are functions of the seed and the step, so
there is no generator state to keep.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sambay.errors import CheckpointMismatch
from sambay.files import sha256_of, write_json
from sambay.model.publish import publish_folder, remove_folder, remove_leftovers
from sambay.model.roles import halved_parameters
from sambay.train.config import CheckpointConfig, RunConfig
from sambay.train.distributed import World
from sambay.train.optim import optimizer_tensors, set_optimizer_step
from sambay.train.pieces import Pieces, load_pieces, pieces_of, save_pieces, stored_shapes
from sambay.train.run_dir import CHECKPOINTS
from sambay.train.same_run import FORMAT_VERSION, STATE_FILE, read_state

MODEL_PREFIX = "model."


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    seconds: spent training, over all restarts.
    skipped: steps whose update was left out.
    rewinds: how often the run went back to a checkpoint, to continue with other data.
    batch_offset: batches passed over by that: step n reads batch n + batch_offset.
    recent_losses: of the last steps that were used, if loss spikes are looked for.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    rewinds: int = 0
    batch_offset: int = 0
    recent_losses: tuple[float, ...] = ()

    @property
    def updates(self) -> int:
        """How often the weights were changed."""
        return self.step - self.skipped


class CheckpointStore:
    """The checkpoints of one run directory, which all processes of the run see."""

    def __init__(self, run_dir: Path, policy: CheckpointConfig, world: World | None = None) -> None:
        self.folder = run_dir / CHECKPOINTS
        self.policy = policy
        self.world = world or World(torch.device("cpu"))
        self._writer: _Writer | None = None

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, ascending."""
        matches = [re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.glob("step-*")]
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.folder / f"step-{step:08d}"

    def latest(self) -> Path | None:
        """The newest complete checkpoint, if any."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def save(
        self,
        progress: Progress,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: RunConfig,
        manifest_hash: str,
    ) -> Path:
        """Publish a checkpoint, then remove those that the policy no longer keeps.

        With `checkpoint.asynchronous` this returns as soon as the state is copied; `wait` tells
        how it ended.

        Raises:
            WriteFailed: the operating system refused, this time or the time before; all earlier
                checkpoints are still there.
        """
        self.wait()
        path = self.path(progress.step)
        tensors = state_pieces(model, optimizer)
        state = {
            "format_version": FORMAT_VERSION,
            **asdict(progress),
            "data_manifest": manifest_hash,
            "processes": self.world.size,
            "config": config.to_dict(),
        }
        if self.policy.asynchronous:
            tensors = {name: pieces.copied() for name, pieces in tensors.items()}
            self._writer = _Writer(self, path, tensors, state)
            self._writer.start()
        else:
            self.write(path, tensors, state)
        return path

    def wait(self, seconds: float | None = None) -> None:
        """Return when no checkpoint is being written any more, or after some seconds.

        Raises:
            WriteFailed: the operating system refused; all earlier checkpoints are still there.
        """
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.join(seconds)
            if writer.error is not None:
                raise writer.error

    def write(self, path: Path, tensors: Mapping[str, Pieces], state: dict[str, Any]) -> None:
        """Write and publish; all processes come here together, on their save group."""
        world, group = self.world, self.world.save_group
        with contextlib.ExitStack() as stack:
            folder = world.on_main(lambda: stack.enter_context(publish_folder(path)), group)
            save_pieces(tensors, folder, world)
            own = world.everywhere(lambda: _checksums(folder, world.rank), group)
            files = {name: sum_ for sums in world.gather(own, group) for name, sum_ in sums.items()}
            world.on_main(lambda: write_json(folder / STATE_FILE, state | {"files": files}), group)
            world.on_main(stack.close, group)
        world.on_main(self._prune, group)

    def clean(self) -> None:
        """Remove what a killed process left half-written."""
        remove_leftovers(self.folder)

    def _prune(self) -> None:
        every = self.policy.keep_every_steps
        for step in self.steps()[: -self.policy.keep]:
            if every is None or step % every:
                remove_folder(self.path(step))


class _Writer(threading.Thread):
    """Writes a copied state while training goes on."""

    def __init__(
        self, store: CheckpointStore, path: Path, tensors: Mapping[str, Pieces], state: dict
    ) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._job = (path, tensors, state)
        self._store = store
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._store.write(*self._job)
        except BaseException as error:  # noqa: BLE001 - lost here; `wait` raises it to the run
            self.error = error
        del self._job  # the copies


def state_pieces(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Pieces]:
    """What this process holds of weights and moments, by name; views of them."""
    tensors = {MODEL_PREFIX + name: value for name, value in model.named_parameters()}
    tensors |= optimizer_tensors(optimizer, model)
    halved = halved_parameters(model)
    return {
        name: pieces_of(tensor, in_halves=name.partition(".")[2] in halved)
        for name, tensor in tensors.items()
    }


def restore(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World | None = None,
) -> Progress:
    """How far the run of a checkpoint had come, after filling model and optimiser from it.

    `check_same_run` first tells whether it is a checkpoint of the same run.

    Raises:
        CheckpointMismatch: a damaged file, or tensors of another model; nothing was changed.
    """
    world = world or World(torch.device("cpu"))
    state = read_state(path)
    tensors = state_pieces(model, optimizer)

    def check() -> None:
        check_files(path, state, share=(world.rank, world.size))
        stored = stored_shapes(path)
        for name, pieces in tensors.items():
            if stored.get(name) != tuple(pieces.shape):
                raise CheckpointMismatch(
                    f"{path}: tensor {name} has shape {stored.get(name)}, the model needs "
                    f"{tuple(pieces.shape)}; it is a checkpoint of another model"
                )

    world.everywhere(check)
    load_pieces(tensors, path, world)
    progress = stored_progress(path, state)
    set_optimizer_step(optimizer, model.parameters(), progress.updates)
    return progress


def stored_progress(path: Path, state: dict[str, Any]) -> Progress:
    """The progress in a checkpoint's state.

    Raises:
        CheckpointMismatch: an entry is missing.
    """
    try:
        values: dict[str, Any] = {name: state[name] for name in Progress.__dataclass_fields__}
    except KeyError as error:
        raise CheckpointMismatch(f"{path / STATE_FILE} has no {error}; remove {path}") from error
    values["recent_losses"] = tuple(values["recent_losses"])
    return Progress(**values)


def check_files(path: Path, state: dict[str, Any], *, share: tuple[int, int] = (0, 1)) -> None:
    """Compare the files of a checkpoint with their checksums, or every n-th (first, n) of them.

    Raises:
        CheckpointMismatch: names the file that is missing or differs.
    """
    first, every = share
    for name in sorted(state["files"])[first::every]:
        file = path / name
        if not file.exists() or sha256_of(file) != state["files"][name]:
            raise CheckpointMismatch(
                f"{file} is {'damaged (its checksum differs)' if file.exists() else 'missing'}; "
                f"remove {path} to continue from an earlier checkpoint"
            )


def _checksums(folder: Path, rank: int) -> dict[str, str]:
    """Of the files this process wrote, by name."""
    own = [*folder.glob(f"__{rank}_*"), *([folder / ".metadata"] if rank == 0 else [])]
    return {file.name: sha256_of(file) for file in own}
