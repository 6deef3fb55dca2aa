"""Recording the kernels that a decode step calls, so that one call replays them all.

A step that works in buffers which never move calls the same kernels with the same arguments every
time. While it runs once under a `Recorder`, each call is written down, and memory that kernels ask
for is given out such that it stays. Whatever else torch computes meanwhile would be missing when
the list is replayed: it is noticed, and the reason why there is no recording.
"""

from __future__ import annotations

import array
import itertools
import math
import threading
import time
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sambay.ops.native.library import kernels, packed

_active = threading.local()


def call(name: str, *arguments: Any) -> None:
    """Call a kernel with numbers, tensors (for which their addresses stand) and None."""
    values = [_address(value) if isinstance(value, Tensor) else value for value in arguments]
    getattr(kernels(), name)(*values)
    recorder = getattr(_active, "recorder", None)
    if recorder is not None:
        recorder.add(name, arguments, values)


def _address(tensor: Tensor) -> int:
    # A kernel would read from address 0 what another device holds.
    assert tensor.is_cpu, f"a kernel for the CPU got a tensor on {tensor.device}"
    return tensor.data_ptr()


def recording() -> bool:
    """Whether this thread records."""
    return getattr(_active, "recorder", None) is not None


class Recording:
    """The calls of a step. `replay` makes them again, in the memory in which they were made.

    names: of the kernels, in the order of the calls.
    """

    def __init__(self, names: list[str], calls: list[list[int]], kept: list[Any]) -> None:
        self.names = tuple(names)
        self._words = array.array("q", [word for words in calls for word in words])
        lengths = [len(words) * self._words.itemsize for words in calls]
        start = self._words.buffer_info()[0]
        self._addresses = list(itertools.accumulate(lengths[:-1], initial=start))
        self._kept = kept

    def __len__(self) -> int:
        return len(self.names)

    def replay(self) -> None:
        """All calls, one after another."""
        kernels().sambay_replay(self._addresses[0], len(self))

    def replay_timed(self) -> list[float]:
        """All calls, one after another, and the seconds that each took, with that of calling it."""
        replay, seconds = kernels().sambay_replay, []
        for address in self._addresses:
            began = time.perf_counter()
            replay(address, 1)
            seconds.append(time.perf_counter() - began)
        return seconds


class Recorder(TorchDispatchMode):
    """While it is entered, the calls of this thread are recorded.

    width, rows: those of this step, and the most of any step that shares the buffers.
    buffers: memory of earlier recordings, of which never two are replayed at a time; it grows.
    reason: why what was recorded is not the whole step; None if it is.
    """

    def __init__(self, width: int, rows: int, buffers: list[Tensor]) -> None:
        super().__init__()
        self.reason: str | None = None
        self._width, self._rows, self._buffers = width, rows, buffers
        self._given = 0
        self._unwritten: set[int] = set()  # addresses of memory that no call has been seen to fill
        self._names: list[str] = []
        self._calls: list[list[int]] = []
        self._kept: list[Any] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Asked by the base class, which else imports torch's compiler before the first step: a
        # second and a half at the start of every answer. Nothing is recorded while code is traced.
        return False

    def __enter__(self) -> Recorder:
        assert not recording(), "one recorder at a time"
        super().__enter__()
        _active.recorder = self
        return self

    def __exit__(self, *error: Any) -> None:
        _active.recorder = None
        super().__exit__(*error)

    def result(self) -> Recording | None:
        """What was recorded; None if there is a `reason`."""
        if self.reason is None and self._unwritten:
            self.reason = "memory is filled by something else than a decode operation"
        if self.reason is not None:
            return None
        return Recording(self._names, self._calls, self._kept)

    def add(self, name: str, arguments: tuple[Any, ...], values: list[Any]) -> None:
        """Write down a call."""
        self._unwritten.difference_update(values)
        self._names.append(name)
        self._calls.append(packed(name, values))
        # A tensor may be given other memory; what the list points to must not be freed.
        self._kept += [x.untyped_storage() for x in arguments if isinstance(x, Tensor)]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.new_empty.default and self.reason is None:
            return self._allocate(*args, **kwargs)
        out = func(*args, **kwargs)
        if self.reason is None and not _is_view(func, args, out):
            self.reason = f"it computes {func.overloadpacket} outside the decode operations"
        return out

    def _allocate(self, like: Tensor, shape: list[int], **options: Any) -> Tensor:
        dtype = options.get("dtype") or like.dtype
        size = math.prod(shape) * dtype.itemsize
        # Wide enough for every width, so that steps of all widths use the same memory.
        room = -(-size // self._width) * self._rows
        if self._given == len(self._buffers):
            self._buffers.append(torch.empty(0, dtype=torch.uint8))
        if self._buffers[self._given].nbytes < room:
            self._buffers[self._given] = torch.empty(room, dtype=torch.uint8)
        buffer = self._buffers[self._given]
        self._given += 1
        self._unwritten.add(buffer.data_ptr())
        return buffer[:size].view(dtype).view(shape)


def _is_view(func: Any, args: tuple[Any, ...], out: Any) -> bool:
    """Whether all of the result lies in the memory of the arguments, which were left alone."""
    results = out if isinstance(out, list | tuple) else [out]
    tensors = [*results, *(x for x in args if isinstance(x, Tensor))]
    if func._schema.is_mutable or not results or not all(type(x) in _PLAIN for x in tensors):
        return False
    places = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
    return all(x.untyped_storage().data_ptr() in places for x in results)


_PLAIN = (Tensor, torch.nn.Parameter)
