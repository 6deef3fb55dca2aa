"""Books of names and phone numbers, and the question at the end of each, exactly as published."""

from __future__ import annotations

import enum
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sambay.evals.phonebook import census
from sambay.evals.phonebook.names import FIRST_NAMES, LAST_NAMES, unique_names

FEWEST_PAIRS = 3  # two examples and the one that is asked for


class Variant(enum.StrEnum):
    """Where names come from, and so whether a question has one answer."""

    UNIQUE = "unique"  # no name occurs twice in a book
    PUBLISHED = "published"  # the published prompts, in which a name may occur twice


@dataclass(frozen=True)
class Entries:
    """What entries are made of: how many of the first and last names, digits of a number."""

    first_names: int = len(FIRST_NAMES)
    last_names: int = len(LAST_NAMES)
    digits: int = 10

    def draw(self, generator: random.Random, count: int) -> tuple[list[str], list[str]]:
        """Names of which none occurs twice, and their numbers."""
        names = unique_names(generator, count, self.first_names, self.last_names)
        return names, [unique_phone(generator, self.digits) for _ in range(count)]


ALL_NAMES = Entries()


@dataclass(frozen=True)
class Protocol:
    """How many questions there are and what they are: `groups` x `batches` x `prompts` per length.

    depths: per cent of the book at which the entry asked for lies, in turn; none: anywhere.
    entries: where names are unique.
    """

    variant: Variant = Variant.UNIQUE
    groups: int = 4
    batches: int = 8
    prompts: int = 4
    seed: int = 42
    instruction: bool = False
    depths: tuple[int, ...] = ()
    entries: Entries = ALL_NAMES


@dataclass(frozen=True)
class Question:
    """A prompt and the number that answers it.

    needle: the place of the entry asked for in the book, from 0.
    homonyms: the numbers of other entries under the same name; such a question is ambiguous.
    """

    pairs: int
    group: int
    batch: int
    number: int
    prompt: str
    name: str
    phone: str
    needle: int
    homonyms: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What names the question among all of all lengths."""
        return f"{self.pairs}-{self.group}-{self.batch}-{self.number}"


def questions(pairs: int, protocol: Protocol) -> Iterator[Question]:
    """All questions about books of one length, group by group.

    A question depends on its own place only, not on how many there are.

    Raises:
        MissingPackage: the published variant, without the package `names`.
    """
    for group in range(protocol.groups):
        for batch in range(protocol.batches):
            if protocol.variant is Variant.PUBLISHED:
                yield from _published_batch(pairs, group, batch, protocol)
            else:
                for number in range(protocol.prompts):
                    yield _unique_question(pairs, group, batch, number, protocol)


def first_line(text: str) -> str:
    """The prediction in a continuation: its first line, without white space around it."""
    return text.split("\n")[0].strip()


def entries_of(names: Sequence[str], phones: Sequence[str]) -> list[str]:
    """The lines of a book."""
    return [f"{name}: {phone}" for name, phone in zip(names, phones, strict=True)]


def prompt_of(entries: Sequence[str], examples: tuple[int, int], name: str) -> str:
    """A book, two of its entries again, and the name whose number is asked for."""
    first, second = examples
    return "\n".join([*entries, "", entries[first], entries[second], "", f"{name}:"])


def _unique_question(
    pairs: int, group: int, batch: int, number: int, protocol: Protocol
) -> Question:
    place = f"{protocol.seed} {pairs} {group} {batch} {number}"
    generator = random.Random(f"phonebook question {place}")
    names, phones = protocol.entries.draw(generator, pairs)
    drawn = generator.sample(range(pairs), 3)
    if protocol.depths:
        turn = batch * protocol.prompts + number
        depth = protocol.depths[turn % len(protocol.depths)]
        needle = min(pairs * depth // 100, pairs - 1)
        drawn = [*[index for index in drawn if index != needle][:2], needle]
    first, second, needle = drawn
    return _question(names, phones, (first, second, needle), (group, batch, number), protocol)


def unique_phone(generator: random.Random, digits: int = 10) -> str:
    """That many digits, of which the first is from 6 to 9."""
    return str(generator.randrange(6 * 10 ** (digits - 1), 10**digits))


def _published_batch(pairs: int, group: int, batch: int, protocol: Protocol) -> Iterator[Question]:
    """The questions drawn one after another from one seed: the digits of their place in a row."""
    generator = random.Random(int(f"{protocol.seed}{group}{pairs}{batch}"))
    for number in range(protocol.prompts):
        names, phones = [], []
        for _ in range(pairs):
            names.append(census.full_name(generator))
            phones.append(census.phone(generator))
        first, second, needle = generator.sample(list(range(pairs)), 3)
        yield _question(names, phones, (first, second, needle), (group, batch, number), protocol)


def _question(
    names: Sequence[str],
    phones: Sequence[str],
    drawn: tuple[int, int, int],
    place: tuple[int, int, int],
    protocol: Protocol,
) -> Question:
    first, second, needle = drawn
    name = names[needle]
    prompt = prompt_of(entries_of(names, phones), (first, second), name)
    if protocol.instruction:
        prompt = f"Please find the number of {name}.\n{prompt}"
    homonyms = [phones[at] for at, other in enumerate(names) if other == name and at != needle]
    return Question(len(names), *place, prompt, name, phones[needle], needle, tuple(homonyms))
