"""Chained assignments: `mo=cu` lines in any order, to be followed from one variable to the last.

A model that answers writes every variable on the way, so the steps of its reasoning are as many as
its answer has words, and each is a look-up in the text. Unlike a phone book, a line found wrongly
spoils all that comes after it. The last line of a chain ends with a dot (`qi=ze.`): that no line
goes on from a variable would be a question of another kind, and small models that followed chains
of 16 without a slip did not learn it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sambay.errors import ConfigError

# Syllables, which are one token for many tokenizers, so that a step is one look-up.
VARIABLES = tuple(first + second for first in "bcdfghjklmnpqrstvwxyz" for second in "aeiou")
END = "."


@dataclass(frozen=True)
class Puzzle:
    """Assignments in the order of the text, and chains from their first variable to the last."""

    lines: tuple[str, ...]
    chains: tuple[tuple[str, ...], ...]

    @property
    def text(self) -> str:
        """The assignments and the blank line behind them."""
        return "\n".join(self.lines) + "\n\n"


def puzzle(generator: random.Random, steps: Sequence[int]) -> Puzzle:
    """Chains of these numbers of assignments, no variable in two of them, all lines shuffled.

    Raises:
        ConfigError: a chain without an assignment, or more variables than there are.
    """
    if not steps or min(steps) < 1:
        raise ConfigError(f"chains of {list(steps)} assignments; each needs at least 1")
    needed = sum(steps) + len(steps)
    if needed > len(VARIABLES):
        raise ConfigError(
            f"chains of {sum(steps)} assignments need {needed} variables, there are "
            f"{len(VARIABLES)}; ask for fewer lines or steps"
        )
    names = iter(generator.sample(VARIABLES, needed))
    chains = tuple(tuple(next(names) for _ in range(count + 1)) for count in steps)
    lines = [
        f"{name}={value}{END if value == chain[-1] else ''}"
        for chain in chains
        for name, value in pairwise(chain)
    ]
    generator.shuffle(lines)
    return Puzzle(tuple(lines), chains)


def question(chain: Sequence[str]) -> str:
    """What a prompt ends with: `mo=`."""
    return chain[0] + "="


def answer(chain: Sequence[str]) -> str:
    """What is to be written behind the question, up to the end of its line: `cu=qi=ze.`"""
    return "=".join(chain[1:]) + END


def chain_documents(
    seed: int, count: int, *, most_lines: int, most_steps: int, most_questions: int
) -> Iterator[str]:
    """Texts to train on: a puzzle, then several of its chains asked and answered.

    The prompt of a test is the beginning of such a text.
    """
    for number in range(count):
        generator = random.Random(f"chain documents {seed} {number}")
        steps = [generator.randint(1, most_steps)]
        goal = generator.randint(2, most_lines)
        while sum(steps) < goal:
            steps.append(min(generator.randint(1, most_steps), goal - sum(steps)))
        made = puzzle(generator, steps)
        asked = generator.sample(made.chains, min(len(made.chains), most_questions))
        yield made.text + "".join(f"{question(one)}{answer(one)}\n" for one in asked)
