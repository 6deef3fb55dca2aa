"""How attention heads are laid out for vLLM and shared out among processes; knows no vLLM.

vLLM's attention takes plain grouped heads. Differential attention fits in it without a byte more of
cache: a pair of key heads is one head of twice the size, [k1, k2], its value is [v1, v2], and each
query is padded on the side of the map it does not belong to, [q1, 0] and [0, q2].
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from sambay.errors import ConfigError
from sambay.spec import AttentionVariant, ModelConfig


@dataclasses.dataclass(frozen=True)
class HeadPlan:
    """The heads of one model on one of `processes` processes.

    A unit is what cannot be divided: a head, or the pair of heads of differential attention.

    maps: query heads per unit, 1 or 2.
    query_units, key_units: of the whole model.
    key_copies: how many processes-wide copies of a key unit there are, so that every process has
        the same number of query units for each key unit; 1 where the units divide.
    head_dim: of the model.
    size: of one head as vLLM sees it, `maps * head_dim` or the next size its attention takes.
    """

    processes: int
    maps: int
    query_units: int
    key_units: int
    key_copies: int
    head_dim: int
    size: int

    @property
    def queries(self) -> int:
        """Query heads of one process."""
        return self.maps * self.query_units // self.processes

    @property
    def keys(self) -> int:
        """Key units of one process, copies included."""
        return self.total_keys // self.processes

    @property
    def total_keys(self) -> int:
        """Key units of all processes together, copies included."""
        return self.key_units * self.key_copies

    @property
    def unit_size(self) -> int:
        """The width of one unit in the model's projections."""
        return self.maps * self.head_dim

    def copy_keys(self, rows: Tensor) -> Tensor:
        """The rows of a joint key and value projection, each unit as often as it is needed."""
        if self.key_copies == 1:
            return rows
        units = rows.view(2, self.key_units, self.unit_size, *rows.shape[1:])
        return units.repeat_interleave(self.key_copies, dim=1).flatten(0, 2)

    def widen_queries(self, q: Tensor) -> Tensor:
        """(T, queries * head_dim) to (T, queries * size), zero where a query does not look."""
        if self.maps == 2:
            first, second = q.unflatten(-1, (-1, 2, self.head_dim)).unbind(-2)
            width = self.head_dim
            q = torch.stack((F.pad(first, (0, width)), F.pad(second, (width, 0))), dim=-2)
        return self._padded(q)

    def widen_keys(self, k: Tensor) -> Tensor:
        """(T, keys * unit_size) to (T, keys * size); of values as well."""
        return self._padded(k)

    def narrow(self, out: Tensor) -> Tensor:
        """(T, queries * size) to (T, queries, unit_size)."""
        return out.unflatten(-1, (-1, self.size))[..., : self.unit_size]

    def _padded(self, x: Tensor) -> Tensor:
        if self.size > self.unit_size:
            x = x.reshape(x.shape[0], -1, self.unit_size)
            x = F.pad(x, (0, self.size - self.unit_size))
        return x.reshape(x.shape[0], -1)


def plan_heads(config: ModelConfig, processes: int, sizes: Iterable[int] | None) -> HeadPlan:
    """The layout on `processes` processes, where vLLM's attention takes heads of these `sizes`.

    sizes: None where it takes any multiple of 8.

    Raises:
        ConfigError: the units cannot be divided among the processes, or are too large.
    """
    maps = 2 if config.attention_variant is AttentionVariant.DIFFERENTIAL else 1
    query_units, key_units = config.num_heads // maps, config.num_kv_heads // maps
    if query_units % processes:
        kind = "pairs of query heads" if maps == 2 else "query heads"
        possible = ", ".join(str(n) for n in range(1, query_units + 1) if query_units % n == 0)
        raise ConfigError(
            f"tensor_parallel_size = {processes} does not divide the {query_units} {kind} of this "
            f"model; choose one of {possible}"
        )
    group, own = query_units // key_units, query_units // processes
    # Each process has `own` neighbouring query units. With this many of them for each key unit, no
    # process has a part of a group, and where groups divide nothing is copied.
    shared = math.gcd(own, group)
    size = _head_size(maps * config.head_dim, None if sizes is None else tuple(sizes))
    return HeadPlan(processes, maps, query_units, key_units, group // shared, config.head_dim, size)


def _head_size(needed: int, sizes: tuple[int, ...] | None) -> int:
    if sizes is None:
        return -(-needed // 8) * 8
    fitting = [size for size in sizes if size >= needed]
    if not fitting:
        raise ConfigError(
            f"attention needs heads of {needed}, vLLM's attention on this machine has at most "
            f"{max(sizes)}; this model cannot be served here"
        )
    return min(fitting)
