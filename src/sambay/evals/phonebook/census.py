"""The draws of the published books: full names of the package `names`, and phone numbers.

The published books are drawn from Python's one global generator. Here the same draws are made from
a generator of one's own, in the same order, so nothing outside is disturbed. The package looks a
name up by reading its file from the top, which for all books of 32K tokens takes half an hour;
bisecting the same cumulative frequencies finds the same name.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import random

from sambay.errors import MissingPackage

_SHARE = 90  # the per cent of the census that the files cover, over which the package draws


def full_name(generator: random.Random) -> str:
    """What `names.get_full_name()` returns, drawn from `generator` as it draws from `random`.

    Raises:
        MissingPackage: names is not installed.
    """
    gender = generator.choice(("male", "female"))
    first = _name(f"first:{gender}", generator.random() * _SHARE)
    return f"{first} {_name('last', generator.random() * _SHARE)}"


def phone(generator: random.Random) -> str:
    """Ten digits, the first from 6 to 9, each drawn on its own as the published books do."""
    digits = [generator.randint(6, 9), *(generator.randint(0, 9) for _ in range(9))]
    return "".join(map(str, digits))


def _name(kind: str, selected: float) -> str:
    names, shares = _table(kind)
    place = bisect.bisect_right(shares, selected)  # the first share that is greater
    return names[place].capitalize() if place < len(names) else ""


@functools.cache
def _table(kind: str) -> tuple[list[str], list[float]]:
    """The names of one of the package's files, and the greatest cumulative share so far at each."""
    try:
        import names
    except ImportError as error:
        raise MissingPackage("names", "the published variant of Phonebook", "eval") from error
    with open(names.FILES[kind], encoding="ascii") as file:
        rows = [line.split() for line in file]
    shares = itertools.accumulate((float(row[2]) for row in rows), max)
    return [row[0] for row in rows], list(shares)
