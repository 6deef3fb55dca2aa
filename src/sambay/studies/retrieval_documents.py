"""What the models of the retrieval study read: books, chains, needles, repeated numbers.

Looking up is learned from short texts, in which few places can be meant, and carried over to long
ones; so every kind begins with the shortest, and short books and numbers are kinds of their own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from sambay.evals.chains import chain_documents
from sambay.evals.phonebook.books import Entries
from sambay.evals.phonebook.documents import phone_book_documents

# Names are single tokens of the study's tokenizer, and a number is three of two digits each.
ENTRIES = Entries(first_names=40, last_names=60, digits=6)
SHORT_PAIRS, PAIRS = (3, 6), (3, 12)
_ASKED = 14  # questions behind a book; entries are asked several times
SHORT_CHAINS, CHAINS = (8, 4), (24, 8)  # assignments of a puzzle, steps of a chain, at most
_PIECES = (8, 40)  # of two digits, in a repeated number
_REPEATED = 120  # tokens of a text of repeated numbers
_HAY = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_MOST_HAY, _MOST_NEEDLES = 4, 3
_ADJECTIVES = """
amber brave calm dusty eager faint gentle hollow icy jolly keen lively mellow noble odd plain quick
rough silent tidy urban vivid warm young zesty bright cold dark early fierce
"""
_NOUNS = """
apple bridge candle desert engine forest garden hammer island jacket kettle ladder mirror needle
orange pencil quarry river saddle temple umbrella valley window yard zebra anchor basket cabin
dragon eagle
"""


def books(seed: int, count: int, pairs: tuple[int, int]) -> Iterator[str]:
    """Phone books with questions, each size equally often as its double."""
    low, high = pairs
    for number in range(count):
        generator = random.Random(f"size of book {seed} {number}")
        size = min(int(low * ((high + 1) / low) ** generator.random()), high)
        own_seed = seed * 1_000_000 + number
        yield from phone_book_documents(own_seed, 1, (size, size), (_ASKED, _ASKED), ENTRIES)


def chains(seed: int, count: int, most: tuple[int, int]) -> Iterator[str]:
    """Assignments, and chains of them followed."""
    lines, steps = most
    return chain_documents(seed, count, most_lines=lines, most_steps=steps, most_questions=4)


def repeats(seed: int, count: int) -> Iterator[str]:
    """Numbers of pieces of two digits, no piece twice in one, each written again and again."""
    for number in range(count):
        generator = random.Random(f"repeated number {seed} {number}")
        pieces = generator.sample(range(100), generator.randint(*_PIECES))
        text = "".join(f"{piece:02}" for piece in pieces)
        yield f"{text}\n" * max(2, _REPEATED // (len(pieces) + 1))


def needles(seed: int, count: int) -> Iterator[str]:
    """One to three magic numbers in as much noise, worded as in RULER, and a question for one.

    The keys are others than those of the test, and so are the numbers.
    """
    for number in range(count):
        generator = random.Random(f"needles {seed} {number}")
        adjectives, nouns = _ADJECTIVES.split(), _NOUNS.split()
        count_here = generator.randint(1, _MOST_NEEDLES)
        keys = [
            f"{adjectives[at // len(nouns)]}-{nouns[at % len(nouns)]}"
            for at in generator.sample(range(len(adjectives) * len(nouns)), count_here)
        ]
        values = [str(generator.randrange(10**6, 10**7)) for _ in keys]
        lines = [_HAY] * generator.randint(0, _MOST_HAY)
        for key, value in zip(keys, values, strict=True):
            line = f"One of the special magic numbers for {key} is: {value}."
            lines.insert(generator.randint(0, len(lines)), line)
        place = generator.randrange(count_here)
        asked = f"special magic number for {keys[place]} mentioned in the provided text"
        yield (
            "\n".join(
                (
                    "A special magic number is hidden within the following text. Make sure to "
                    "memorize it. I will quiz you about the number afterwards.",
                    *lines,
                    f"What is the {asked}? The {asked} is {values[place]}.",
                )
            )
            + "\n"
        )
