"""Texts to train on that end as the questions do: a book, then some of its entries asked again."""

from __future__ import annotations

import random
from collections.abc import Iterator

from sambay.errors import ConfigError
from sambay.evals.phonebook.books import ALL_NAMES, FEWEST_PAIRS, Entries, entries_of


def phone_book_documents(
    seed: int,
    count: int,
    pairs_range: tuple[int, int],
    questions_range: tuple[int, int] = (1, 8),
    entries: Entries = ALL_NAMES,
) -> Iterator[str]:
    """`count` documents, always the same for a seed; both ends of the ranges are included.

    Each is a book of `pairs_range` entries, two of them again, and after an empty line
    `questions_range` others with their numbers; when all others were asked, they are asked again in
    another order. Cut behind the colon of the first of these, a document is a prompt of the test.
    Names are drawn from the lists of the test, but with other seeds than any of its books.

    Raises:
        ConfigError: a range that is empty or outside of what is possible.
    """
    _check("count", (count, count), 0, None)
    _check("pairs_range", pairs_range, FEWEST_PAIRS, entries.first_names * entries.last_names)
    _check("questions_range", questions_range, 1, None)
    return (
        _document(
            random.Random(f"phonebook document {seed} {index}"),
            pairs_range,
            questions_range,
            entries,
        )
        for index in range(count)
    )


def _document(
    generator: random.Random,
    pairs_range: tuple[int, int],
    questions_range: tuple[int, int],
    kind: Entries,
) -> str:
    pairs = generator.randint(*pairs_range)
    num_questions = generator.randint(*questions_range)
    entries = entries_of(*kind.draw(generator, pairs))
    order = generator.sample(entries, pairs)
    examples, others, asked = order[:2], order[2:], order[2:]
    while len(asked) < num_questions:
        asked = asked + generator.sample(others, len(others))
    return "\n".join([*entries, "", *examples, "", *asked[:num_questions]]) + "\n"


def _check(name: str, ends: tuple[int, int], least: int, most: int | None) -> None:
    low, high = ends
    if low > high:
        raise ConfigError(f"{name} = {ends}; its first number must not be greater than its second")
    if low < least:
        raise ConfigError(f"{name}: {low} is too small; give at least {least}")
    if most is not None and high > most:
        raise ConfigError(f"{name}: {high} is more than the {most:,} names there are; give fewer")
