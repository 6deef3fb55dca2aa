"""The runs of a ladder: architectures x depths x seeds of one recipe, and what each costs.

Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from sambay.errors import ConfigError
from sambay.spec import presets
from sambay.spec.flops import training_parts
from sambay.train.config import RunConfig

Build = Callable[[str, int, int], RunConfig]  # of architecture, depth and seed


class Order(StrEnum):
    """Which run of a ladder comes first.

    cost: the cheap ones, of equals the lower seed.
    seed: the first seed of all sizes, cheap ones first, then the next seed.
    given: as architectures, depths and seeds were given.
    """

    COST = "cost"
    SEED = "seed"
    GIVEN = "given"


@dataclass(frozen=True)
class Member:
    """One run of a ladder; without a configuration where it cannot be built, for this `reason`."""

    architecture: str
    depth: int
    seed: int
    config: RunConfig | None
    reason: str = ""

    @property
    def name(self) -> str:
        return f"{self.architecture}-d{self.depth}-s{self.seed}"

    @property
    def flops(self) -> int:
        """Floating-point operations of training it; 0 if it cannot be built."""
        return 0 if self.config is None else run_flops(self.config)


def run_flops(config: RunConfig) -> int:
    """Floating-point operations of a whole run: every part, see `sambay.spec.flops`."""
    length = config.data.sequence_length
    rows = config.num_steps * config.batch.global_batch_size
    return training_parts(config.model, length).total * rows


def expand(
    build: Build, architectures: Sequence[str], depths: Sequence[int], seeds: Sequence[int]
) -> list[Member]:
    """All runs of a ladder, also those that cannot be built, which say why.

    Raises:
        ConfigError: a word is given twice, an architecture is unknown, nothing can be built, or
            the recipe ignores one of the three.
    """
    for word, values in (("architecture", architectures), ("depth", depths), ("seed", seeds)):
        for value in values:
            if values.count(value) > 1:
                raise ConfigError(f"{word} {value} is given twice; leave one of them out")
    members = []
    for architecture in architectures:
        if not re.fullmatch(r"[\w.+-]+", architecture):
            raise ConfigError(
                f"architecture '{architecture}' cannot name a folder; use letters, digits and .+-_"
            )
        mine = [_member(build, architecture, depth, seed) for depth in depths for seed in seeds]
        # What no depth allows is a misspelt name, unless there is an architecture of that name.
        if architecture not in presets.NAMES and all(one.config is None for one in mine):
            raise ConfigError(mine[0].reason)
        members += mine
    if all(one.config is None for one in members):
        raise ConfigError(f"no run of this ladder can be built; {members[0].reason}")
    _check_all_count(members)
    return members


def in_order(members: Sequence[Member], order: Order) -> list[Member]:
    """The runs that can be built, in the order in which they are started."""
    buildable = [one for one in members if one.config is not None]
    if order is Order.COST:
        return sorted(buildable, key=lambda one: (one.flops, one.seed))
    if order is Order.SEED:
        return sorted(buildable, key=lambda one: (one.seed, one.flops))
    return buildable


def _member(build: Build, architecture: str, depth: int, seed: int) -> Member:
    try:
        return Member(architecture, depth, seed, build(architecture, depth, seed))
    except ConfigError as error:
        return Member(architecture, depth, seed, None, str(error))


def _check_all_count(members: Sequence[Member]) -> None:
    """Make sure that each of the words changes something in at least one run.

    Two architectures may well be one at some depth: without a cross-decoder, say.
    """
    for word in ("architecture", "depth", "seed"):
        others = [name for name in ("architecture", "depth", "seed") if name != word]
        groups: dict[tuple[object, ...], list[Member]] = {}
        for member in members:
            if member.config is not None:
                key = tuple(getattr(member, name) for name in others)
                groups.setdefault(key, []).append(member)
        pairs = [(one, two) for group in groups.values() for one, two in pairwise(group)]
        if pairs and all(one.config == two.config for one, two in pairs):
            one, two = pairs[0]
            raise ConfigError(
                f"{one.name} and {two.name} would be the same run, and so would all others: the "
                f"recipe makes nothing of its argument {word}"
            )
