"""The data of the retrieval study: real text, books, chains, repeated numbers, one tokenizer.

A number of many digits, and the same again: the second time every token follows from one look-up of
the token before it, the simplest of what the books and chains ask for.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sambay.data.prepare import prepare
from sambay.data.settings import PrepareSettings
from sambay.data.sources import list_files
from sambay.data.tokenizer import TOKENIZER_FILE, Tokenizer
from sambay.errors import ConfigError, DataError
from sambay.evals.chains import chain_documents
from sambay.evals.phonebook.documents import phone_book_documents
from sambay.files import atomic_write

TEXT, BOOKS, CHAINS, REPEATS = "text", "books", "chains", "repeats"
_SOURCES, _TOKENIZER = "sources", "tokenizer"
_EXCLUDED = ("site-packages", "encodings", "pydoc_data", "idle_test")
_SAMPLE_WRITTEN = 2_000
_SAMPLE_CHARACTERS = 1_000_000
# Two digits make a token. With one, as in Llama 2's vocabulary, the last token says too little of
# where in a book one is: copying ten symbols is not learned in the steps in which copying 64 is.
_DIGITS = r" ?[0-9]{1,2}"


@dataclass(frozen=True)
class CorpusSettings:
    """What is written.

    text: a folder of real text; None: the sources of the running Python's standard library.
    vocab_size: entries of the tokenizer.
    pairs: entries of a phone book, from and to.
    most_entries: of a book with its examples and questions, so that it fits a row.
    lines, steps: the most assignments of a puzzle, and steps of a chain.
    books, chains, repeats: documents of each kind.
    pieces: of two digits that a number to be repeated has, from and to.
    validation_fraction: of the documents of each kind.
    """

    vocab_size: int
    text: Path | None = None
    pairs: tuple[int, int] = (3, 22)
    most_entries: int = 25
    lines: int = 40
    steps: int = 10
    books: int = 40_000
    chains: int = 20_000
    repeats: int = 20_000
    pieces: tuple[int, int] = (10, 60)
    seed: int = 1
    validation_fraction: float = 0.01


def write_corpus(
    folder: Path, settings: CorpusSettings, *, tell: Callable[[str], None] = lambda line: None
) -> None:
    """Write a prepared set of each kind, with one tokenizer; if they are there, check them.

    Raises:
        ConfigError, DataError: a folder without text, or sets that were made otherwise.
        WriteFailed: the disk is full or refuses.
    """
    text = settings.text or Path(os.__file__).parent
    if not text.is_dir():
        raise ConfigError(f"text = {text} is not a folder; give one with the texts to train on")
    sources = folder / _SOURCES
    _write_once(sources / f"{BOOKS}.jsonl", _book_documents(settings), tell)
    _write_once(
        sources / f"{CHAINS}.jsonl",
        chain_documents(
            settings.seed, settings.chains,
            most_lines=settings.lines, most_steps=settings.steps, most_questions=3,
        ),
        tell,
    )  # fmt: skip
    _write_once(sources / f"{REPEATS}.jsonl", _repeats(settings), tell)
    include = () if settings.text else ("*.py",)
    exclude = () if settings.text else _EXCLUDED
    if not (folder / _TOKENIZER / TOKENIZER_FILE).exists():
        tell("training the tokenizer")
        sample = [*_text_sample(text, include, exclude, folder), *_written_sample(sources)]
        tokenizer = Tokenizer.train(sample, settings.vocab_size, apart=_DIGITS)
        tokenizer.save(folder / _TOKENIZER)
    for name, place in (
        (TEXT, text),
        (BOOKS, sources / f"{BOOKS}.jsonl"),
        (CHAINS, sources / f"{CHAINS}.jsonl"),
        (REPEATS, sources / f"{REPEATS}.jsonl"),
    ):
        prepared = prepare(
            [place],
            folder / name,
            PrepareSettings(
                tokenizer=str(folder / _TOKENIZER),
                include=include if name == TEXT else (),
                exclude=exclude if name == TEXT else (),
                validation_fraction=settings.validation_fraction,
            ),
        )
        total = prepared.manifest.total("train", "tokens")
        tell(f"{folder / name}: {total:,} tokens to train on")


def _book_documents(settings: CorpusSettings) -> Iterator[str]:
    """Books with as many questions as a row still holds, each size equally often as its double.

    Looking up is learned from small books, of which a row has more answers.
    """
    low, high = settings.pairs
    for number in range(settings.books):
        generator = random.Random(f"size of book {settings.seed} {number}")
        pairs = min(int(low * ((high + 1) / low) ** generator.random()), high)
        questions = max(1, settings.most_entries - pairs - 2)
        seed = settings.seed * 1_000_000 + number
        yield from phone_book_documents(seed, 1, (pairs, pairs), (questions, questions))


def _repeats(settings: CorpusSettings) -> Iterator[str]:
    """Numbers of pieces of two digits, no piece twice in one, each written twice."""
    for number in range(settings.repeats):
        generator = random.Random(f"repeated number {settings.seed} {number}")
        pieces = generator.sample(range(100), generator.randint(*settings.pieces))
        text = "".join(f"{piece:02}" for piece in pieces)
        yield f"{text}\n{text}\n"


def _written_sample(sources: Path) -> Iterator[str]:
    """As many books and chains as there is text, to train the tokenizer on."""
    for name in (BOOKS, CHAINS, REPEATS):
        with (sources / f"{name}.jsonl").open(encoding="utf-8") as file:
            yield from (
                json.loads(line)["text"] for line in itertools.islice(file, _SAMPLE_WRITTEN)
            )


def _text_sample(
    text: Path, include: tuple[str, ...], exclude: tuple[str, ...], folder: Path
) -> Iterator[str]:
    """The first texts, to train the tokenizer on."""
    taken = 0
    for file in list_files([text], include=include, exclude=exclude, out=folder).files:
        try:
            content = Path(file.path).read_bytes().decode("utf-8", "ignore")
        except OSError as error:
            raise DataError(f"{file.path} cannot be read: {error.strerror}") from error
        taken += len(content)
        yield content
        if taken > _SAMPLE_CHARACTERS:
            return


def _write_once(path: Path, documents: Iterable[str], tell: Callable[[str], None]) -> None:
    if path.exists():
        return
    tell(f"writing {path}")
    with atomic_write(path) as file:
        for text in documents:
            file.write((json.dumps({"text": text}) + "\n").encode())
