"""The data of the retrieval study: real text, and every kind of document, with one tokenizer."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sambay.data.prepare import prepare
from sambay.data.settings import PrepareSettings
from sambay.data.sources import list_files
from sambay.data.tokenizer import TOKENIZER_FILE, Tokenizer
from sambay.errors import ConfigError, DataError
from sambay.files import atomic_write
from sambay.studies import retrieval_documents as documents

TEXT = "text"
KINDS: dict[str, Callable[[int, int], Iterator[str]]] = {
    "short_books": partial(documents.books, pairs=documents.SHORT_PAIRS),
    "books": partial(documents.books, pairs=documents.PAIRS),
    "chains": partial(documents.chains, most=documents.CHAINS),
    "short_chains": partial(documents.chains, most=documents.SHORT_CHAINS),
    "needles": documents.needles,
    "repeats": documents.repeats,
}
_SOURCES, _TOKENIZER = "sources", "tokenizer"
_EXCLUDED = ("site-packages", "encodings", "pydoc_data", "idle_test")
_SAMPLE_WRITTEN = 2_000
_SAMPLE_CHARACTERS = 1_000_000
# Two digits make a token: with one, as in Llama 2's vocabulary, the last token says too little of
# where one is, and with three every token is rare.
_DIGITS = "[0-9]{1,2}"


@dataclass(frozen=True)
class CorpusSettings:
    """What is written.

    text: a folder of real text; None: the sources of the running Python's standard library.
    vocab_size: entries of the tokenizer.
    documents: of each kind.
    validation_fraction: of the documents of each kind.
    """

    vocab_size: int
    text: Path | None = None
    documents: int = 20_000
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
    for name, write in KINDS.items():
        _write_once(sources / f"{name}.jsonl", write(settings.seed, settings.documents), tell)
    include = () if settings.text else ("*.py",)
    exclude = () if settings.text else _EXCLUDED
    if not (folder / _TOKENIZER / TOKENIZER_FILE).exists():
        tell("training the tokenizer")
        sample = [*_text_sample(text, include, exclude, folder), *_written_sample(sources)]
        tokenizer = Tokenizer.train(sample, settings.vocab_size, apart=_DIGITS)
        tokenizer.save(folder / _TOKENIZER)
    places = {TEXT: text} | {name: sources / f"{name}.jsonl" for name in KINDS}
    for name, place in places.items():
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


def _written_sample(sources: Path) -> Iterator[str]:
    """Documents of every kind, to train the tokenizer on."""
    for name in (one for one in KINDS if one != "short_chains"):  # its words are those of chains
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
