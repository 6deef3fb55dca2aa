"""The processes of a run: who they are, what they agree on, and how one's mistake reaches all.

Started by torchrun (or anything else that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) a run
has as many processes as were started. Otherwise it has one, and no process group exists.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from sambay.errors import ConfigError, SambayError
from sambay.train.config import Device, RunConfig
from sambay.train.layout import sizes_for

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]
    from torch.distributed.device_mesh import DeviceMesh

_T = TypeVar("_T")
REPLICATE, SHARD, TENSOR = "replicate", "shard", "tensor"


class ToldByAnother(SambayError):
    """An error that another process met and reports itself."""


class LostConnection(SambayError):
    """Another process of the run is gone; the last checkpoint is untouched."""


@dataclass(frozen=True)
class World:
    """One process among those of a run.

    rank, size: its number, and how many there are.
    data_rank, data_size: its number among those that read different rows, and how many these are.
    mesh: the processes by (replicate, shard, tensor); None if there is one process only.
    save_group: for the checkpoints, which are written while the others compute.
    store: shared by all processes, beside the process groups.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    data_rank: int = 0
    data_size: int = 1
    mesh: DeviceMesh | None = None
    save_group: dist.ProcessGroup | None = None
    store: Store | None = field(default=None, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the log and speaks to the person."""
        return self.rank == 0

    @property
    def tensor_size(self) -> int:
        """How many processes compute each layer together."""
        return self.size // self.data_size

    def rows(self, count: int) -> slice:
        """This process's rows of a batch of `count`, which `data_size` divides."""
        assert count % self.data_size == 0, (count, self.data_size)
        share = count // self.data_size
        return slice(self.data_rank * share, (self.data_rank + 1) * share)

    def sum(self, *values: float) -> list[float]:
        """The sums of the values of all processes that read different rows; float64."""
        if self.mesh is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        if self.mesh.get_local_rank(TENSOR) != 0:  # they saw the same rows as their first
            total.zero_()
        dist.all_reduce(total)
        return total.tolist()

    def max(self, value: int) -> int:
        """The greatest of the values of all processes."""
        if self.mesh is None:
            return value
        greatest = torch.tensor(value)
        dist.all_reduce(greatest, dist.ReduceOp.MAX)
        return int(greatest)

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.max(0)

    def on_main(self, action: Callable[[], _T], group: dist.ProcessGroup | None = None) -> _T:
        """What `action` gave on the main process, on all; its user-facing error reaches all."""
        if self.mesh is None:
            return action()
        result, error = _attempt(action) if self.is_main else (None, None)
        told = [(result, None if error is None else str(error))]
        dist.broadcast_object_list(told, src=0, group=group)
        if error is not None:
            raise error
        result, message = told[0]
        if message is not None:
            raise ToldByAnother(message)
        return result  # type: ignore[return-value]

    def everywhere(self, action: Callable[[], _T], group: dist.ProcessGroup | None = None) -> _T:
        """What `action` gives here; a user-facing error of any process is raised in all."""
        if self.mesh is None:
            return action()
        result, error = _attempt(action)
        messages: list[str | None] = [None] * self.size
        dist.all_gather_object(messages, None if error is None else str(error), group=group)
        if error is not None:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise ToldByAnother(f"process {rank}: {message}")
        return result  # type: ignore[return-value]

    def gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """The values of all processes by rank."""
        if self.mesh is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=group)
        return values


def _attempt(action: Callable[[], _T]) -> tuple[_T | None, SambayError | None]:
    try:
        return action(), None
    except SambayError as error:
        return None, error


def _is_lost_connection(error: RuntimeError) -> bool:
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return "gloo" in text or "connection" in text


@contextlib.contextmanager
def joined(config: RunConfig) -> Iterator[World]:
    """This process as a part of its run, until the block ends.

    Raises:
        ConfigError: sizes that do not fit (names the field), or a device that is not there.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        sizes_for(config, 1)
        yield World(compute_device(config.device))
        return
    # Found before the group exists, so that every process stops with the same message by itself.
    replicate, shard, tensor = sizes_for(config, size)
    device = compute_device(config.device, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
    from torch.distributed.rendezvous import rendezvous

    # A process that stands still is found by the watchdog; this is for what that one misses.
    patience = datetime.timedelta(seconds=2 * config.resilience.hang_seconds + 60)
    store, rank, size = next(iter(rendezvous("env://", timeout=patience)))
    store.set_timeout(patience)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=PrefixStore("sambay", store), rank=rank, world_size=size,
        timeout=patience, device_id=device if device.type == "cuda" else None,
    )  # fmt: skip
    try:
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh(
            device.type, (replicate, shard, tensor), mesh_dim_names=(REPLICATE, SHARD, TENSOR)
        )
        save_group = dist.new_group(backend="gloo", timeout=patience)
        assert isinstance(save_group, dist.ProcessGroup)  # all processes are in it
        yield World(
            device,
            rank,
            size,
            data_rank=mesh.get_local_rank(REPLICATE) * shard + mesh.get_local_rank(SHARD),
            data_size=replicate * shard,
            mesh=mesh,
            save_group=save_group,
            store=store,
        )
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        raise LostConnection(
            f"process {rank} lost the connection to another process of the run (see what that one "
            "said last); start the run again: it continues from the last checkpoint "
            f"[{str(error).splitlines()[0][:200]}]"
        ) from error
    finally:
        dist.destroy_process_group()


def compute_device(device: Device, local_rank: int = 0) -> torch.device:
    """The device a process computes on.

    Raises:
        ConfigError: CUDA is asked for, and there is no device for this process.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is Device.CPU or (device is Device.AUTO and available == 0):
        return torch.device("cpu")
    if available == 0:
        raise ConfigError("device = 'cuda', but torch sees no CUDA device; use device=auto")
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if max(local_rank + 1, local_size) > available:
        raise ConfigError(
            f"device = {device.value!r}: this machine has {available} CUDA devices for "
            f"{local_size} processes; start as many processes per machine as it has devices"
        )
    return (
        torch.device("cuda", local_rank)
        if local_rank or "RANK" in os.environ
        else (torch.device("cuda"))
    )
