"""The parts of a tensor that one process holds, and their way to and from a checkpoint.

A checkpoint stores whole tensors cut into pieces; whoever reads it takes what it needs from any of
them. So nothing in it depends on how many processes wrote it, or on how they shared the model.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sambay.errors import CheckpointMismatch
from sambay.files import WriteFailed
from sambay.train.distributed import TENSOR, World


class Part(NamedTuple):
    """A block of a tensor: where it begins in the whole one, and its values (a view)."""

    offsets: tuple[int, ...]
    values: Tensor

    @property
    def place(self) -> tuple[slice, ...]:
        """The indices that select it from the whole tensor."""
        return tuple(
            slice(first, first + count)
            for first, count in zip(self.offsets, self.values.shape, strict=True)
        )


@dataclass(frozen=True)
class Pieces:
    """A tensor of `shape` of which this process holds `parts`, as `torch.distributed.checkpoint`
    wants to see it."""

    shape: torch.Size
    parts: tuple[Part, ...]

    def size(self) -> torch.Size:
        """The shape of the whole tensor."""
        return self.shape

    def copied(self) -> Pieces:
        """The same values in memory of their own, on the CPU."""
        return Pieces(
            self.shape,
            tuple(
                Part(part.offsets, part.values.detach().to("cpu", copy=True)) for part in self.parts
            ),
        )

    def __create_write_items__(self, name: str, value: object) -> list[Any]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import (
            TensorWriteData,
            WriteItem,
            WriteItemType,
        )

        return [
            WriteItem(
                index=MetadataIndex(name, torch.Size(part.offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties.create_from_tensor(part.values),
                    size=self.shape,
                ),
            )
            for part, chunk in zip(self.parts, self.__create_chunk_list__(), strict=True)
        ]

    def __create_chunk_list__(self) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [
            ChunkStorageMetadata(torch.Size(part.offsets), part.values.shape) for part in self.parts
        ]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        for part in self.parts:
            if torch.Size(part.offsets) == index.offset:
                return part.values
        raise AssertionError(f"{index} was planned from these pieces")


def pieces_of(tensor: Tensor, *, in_halves: bool = False) -> Pieces:
    """What this process holds of a tensor, plain or distributed; the values are views.

    `in_halves`: a tensor group has split each half of the rows by itself, so that what a process
    holds comes from two places.
    """
    values = tensor.detach()
    if not hasattr(values, "to_local"):
        return Pieces(values.shape, (Part((0,) * values.dim(), values),))
    from torch.distributed.tensor import DTensor

    assert isinstance(values, DTensor)
    local = values.to_local()
    runs = _held_runs(values, in_halves)
    held = tuple(sum(stop - start for start, stop in dimension) for dimension in runs)
    assert held == tuple(local.shape), (held, local.shape)
    parts = []
    for block in itertools.product(*map(_with_positions, runs)):
        part = local
        for dimension, (_, position, count) in enumerate(block):
            part = part.narrow(dimension, position, count)
        if part.numel():
            parts.append(Part(tuple(first for first, _, _ in block), part))
    return Pieces(values.shape, tuple(parts))


_Runs = list[tuple[int, int]]  # of consecutive rows or columns: first, end


def _held_runs(tensor: Any, in_halves: bool) -> list[_Runs]:
    """Where the local values of a distributed tensor come from, by dimension.

    Counted here because torch's own calculation knows nothing of halves. A tensor group splits
    first, then FSDP cuts what each of the group holds: mesh dimensions from last to first.
    """
    mesh = tensor.device_mesh
    runs: list[_Runs] = [[(0, size)] for size in tensor.shape]
    for index in reversed(range(mesh.ndim)):
        place, count, rank = tensor.placements[index], mesh.size(index), mesh.get_local_rank(index)
        assert not place.is_partial(), tensor.placements
        if place.is_replicate():
            continue
        held = runs[place.dim]
        if mesh.mesh_dim_names[index] == TENSOR and in_halves and place.dim == 0:
            middle = tensor.shape[0] // 2
            halves = ([(0, middle)], [(middle, tensor.shape[0])])
            held = [run for half in halves for run in _share(half, count, rank)]
        else:
            held = _share(held, count, rank)
        runs[place.dim] = held
    return runs


def _share(runs: _Runs, count: int, rank: int) -> _Runs:
    """The runs of one of `count` processes that divide these as `torch.chunk` does."""
    total = sum(stop - start for start, stop in runs)
    size = -(-total // count)
    first, end = rank * size, (rank + 1) * size
    share, position = [], 0
    for start, stop in runs:
        low, high = max(first - position, 0), min(end - position, stop - start)
        if low < high:
            share.append((start + low, start + high))
        position += stop - start
    return share


def _with_positions(runs: _Runs) -> list[tuple[int, int, int]]:
    """For each run its place in the whole, its place in what is held, and its length."""
    placed, position = [], 0
    for start, stop in runs:
        placed.append((start, position, stop - start))
        position += stop - start
    return placed


def save_pieces(tensors: Mapping[str, Pieces], folder: Path, world: World) -> None:
    """Write the pieces of all processes into a folder that all of them see.

    Raises:
        WriteFailed: the operating system refused a process; all processes raise it.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    class Planner(DefaultSavePlanner):
        def lookup_object(self, index: Any) -> Any:
            return self.state_dict[index.fqn].__get_tensor_shard__(index)

    _expect_one_process()
    try:
        save(
            dict(tensors),
            storage_writer=FileSystemWriter(folder),
            planner=Planner(),
            process_group=world.save_group,
            no_dist=world.mesh is None,
        )
    except (CheckpointException, OSError) as error:
        raise WriteFailed(_refusal(folder, error)) from error


def load_pieces(tensors: Mapping[str, Pieces], folder: Path, world: World | None = None) -> None:
    """Fill the pieces from a folder that `save_pieces` wrote, in place.

    Without a world this process reads alone, whatever others do.

    Raises:
        CheckpointMismatch: a damaged or missing file.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    class Planner(DefaultLoadPlanner):
        def set_up_planner(
            self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False
        ) -> None:
            # The inherited one allocates meta tensors and unpacks nested dictionaries; pieces are
            # neither, and it does not know them.
            self.state_dict = self.original_state_dict = state_dict
            self.metadata, self.is_coordinator = metadata, is_coordinator

        def lookup_tensor(self, index: Any) -> Tensor:
            return self.state_dict[index.fqn].__get_tensor_shard__(index)

    alone = world is None or world.mesh is None
    _expect_one_process()
    try:
        load(
            dict(tensors),
            storage_reader=FileSystemReader(folder),
            planner=Planner(flatten_state_dict=False),
            process_group=None if world is None else world.save_group,
            no_dist=alone,
        )
    except (CheckpointException, OSError, RuntimeError, ValueError, EOFError) as error:
        raise CheckpointMismatch(
            f"{folder} cannot be read ({str(error).splitlines()[0]}); remove it to continue from "
            "an earlier checkpoint"
        ) from error


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a folder that `save_pieces` wrote.

    Raises:
        CheckpointMismatch: the list of them is damaged or missing.
    """
    import pickle

    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    except (OSError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise CheckpointMismatch(f"{folder} cannot be read ({error}); remove it") from error
    return {
        name: tuple(entry.size)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def _expect_one_process() -> None:
    """Keep torch from warning that there is no process group where none is meant to be."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninit")


def _refusal(folder: Path, error: BaseException) -> str:
    causes = list(_causes(error))
    refused = [cause for cause in causes if isinstance(cause, OSError)]
    reason = str((refused or causes)[0]).splitlines()[0]
    if any(cause.errno == 28 for cause in refused):
        return f"cannot write {folder}: the disk is full; free some space and run the command again"
    return f"cannot write {folder}: {reason}; check the disk space and the permissions"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The errors that stand behind one, on any process, the first cause first."""
    for failure in getattr(error, "failures", {}).values():
        inner = failure[0] if isinstance(failure, tuple) else failure
        if isinstance(inner, BaseException):
            yield from _causes(inner)
    if error.__cause__ is not None:
        yield from _causes(error.__cause__)
    if error.__context__ is not None and error.__context__ is not error.__cause__:
        yield from _causes(error.__context__)
    yield error
