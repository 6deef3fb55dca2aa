"""Text to token ids and back: a thin wrapper of the `tokenizers` library, imported at first use.

Text given to `encode` is text and nothing else: a document that contains the characters of the
end-of-sequence token is encoded as those characters, never as that token.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from sambay.errors import DataError, MissingPackage
from sambay.files import atomic_write, write_json

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
END_OF_TEXT = "<|endoftext|>"

# Long texts are encoded in pieces: the library needs over 100 bytes of memory per character.
_PIECE = 1 << 15
_LARGEST_PIECE = 1 << 20
_WORD_LENGTH = 64
_WORDS_KEPT = 1 << 18
_SPACE = " \t\n\r\v\f"
# The byte-level pre-tokenizer's split, for ASCII texts.
_WORDS = re.compile(
    r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+"
    rf"| ?[^{_SPACE}A-Za-z0-9]+|[{_SPACE}]+(?![^{_SPACE}])|[{_SPACE}]+"
)
# A lone line break between a visible character and a letter: no pre-tokenizer of the byte-level
# family joins what stands on its two sides, so cutting there changes no token.
_NEUTRAL_CUT = re.compile(r"(?<=\S)\n(?=[A-Za-z])")
_LIKELY_ENDS = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|eos|>", "<EOS>", "[EOS]")


class Tokenizer:
    """A tokenizer.json with a known end-of-sequence token.

    Attributes:
        vocab_size: largest token id + 1; ids of gaps in the vocabulary are never produced.
        eos_id, eos_token: the token that ends every document.
        byte_level: every token stands for fixed bytes, so any text survives the round trip and
            any range of tokens has an exact number of bytes.
        sha256: fingerprint of the file `save` writes.
    """

    def __init__(self, definition: str, eos_token: str) -> None:
        """Take the content of a tokenizer.json; see `load` for the errors raised."""
        self._inner = library().Tokenizer.from_str(definition)
        # What a file may carry for other uses must not act on training texts.
        self._inner.no_truncation()
        self._inner.no_padding()
        if getattr(self._inner.model, "dropout", None):
            self._inner.model.dropout = None
        self._inner.encode_special_tokens = True
        eos_id = self._inner.token_to_id(eos_token)
        if eos_id is None:
            raise DataError(
                f"end-of-sequence token {eos_token!r} is not in the tokenizer's vocabulary; "
                f"name one that is with --eos-token{_offer(self._special_tokens())}"
            )
        self.eos_token = eos_token
        self.eos_id: int = eos_id
        self.vocab_size: int = max(self._inner.get_vocab(with_added_tokens=True).values()) + 1
        self.definition: str = self._inner.to_str(pretty=True)
        self.sha256: str = hashlib.sha256(self.definition.encode()).hexdigest()
        self._words = _Words(self._encode_piece)

    @classmethod
    def load(cls, path: str | os.PathLike[str], eos_token: str | None = None) -> Tokenizer:
        """The tokenizer in a `tokenizer.json` or in a folder that has one.

        Without `eos_token` it is taken from the tokenizer_config.json or special_tokens_map.json
        beside the file, else from the one well-known name in the vocabulary.

        Raises:
            DataError: no file, not a tokenizer, or no certain end-of-sequence token.
            MissingPackage: `tokenizers` is not installed.
        """
        file = Path(path)
        if file.is_dir():
            file = file / TOKENIZER_FILE
            if not file.is_file():
                raise DataError(
                    f"tokenizer folder {path} has no {TOKENIZER_FILE}; save it in that format, "
                    "for example with save_pretrained of a fast tokenizer of transformers"
                )
        package = library()
        try:
            definition = file.read_bytes().decode()
            inner = package.Tokenizer.from_str(definition)
        except OSError as error:
            raise DataError(
                f"tokenizer {path}: {error.strerror}; give a {TOKENIZER_FILE} or its folder"
            ) from error
        except Exception as error:  # what the library raises is of no narrower type
            reason = str(error).splitlines()[0]
            raise DataError(
                f"tokenizer {file} cannot be read ({reason}); give a {TOKENIZER_FILE} "
                "as the tokenizers library writes it"
            ) from error
        return cls(definition, eos_token or _find_eos(file, inner))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, apart: str = "") -> Tokenizer:
        """A byte-level BPE tokenizer with at most `vocab_size` entries; `<|endoftext|>` is id 0.

        apart: a regular expression; what it finds is never joined with what is beside it, such as
            "[0-9]{1,3}" for numbers in groups of three digits.

        The result depends on the multiset of texts only, not on their order or the number of
        threads. Texts too few for that many merges give a smaller vocabulary.
        """
        package = library()
        inner = package.Tokenizer(package.models.BPE())
        bytes_of = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
        if apart:
            split = package.pre_tokenizers.Split(package.Regex(apart), behavior="isolated")
            bytes_of = package.pre_tokenizers.Sequence([split, bytes_of])
        inner.pre_tokenizer = bytes_of
        inner.decoder = package.decoders.ByteLevel()
        trainer = package.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner.to_str(), END_OF_TEXT)

    def encode(self, text: str, *, special_tokens: bool = False) -> list[int]:
        """Token ids of `text`, nothing added; with `special_tokens` their names become their ids.

        Raises:
            DataError: the text holds half of a surrogate pair, which no encoding has.
        """
        if special_tokens:
            # Cutting could divide a name, and prompts with control tokens are short.
            self._inner.encode_special_tokens = False
            try:
                return self._run(text)
            finally:
                self._inner.encode_special_tokens = True
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """Token ids of `text` as uint32; the end-of-sequence id is never among them."""
        parts = [
            np.fromiter(self._encode_fast(piece), np.uint32)
            for piece in cut_for_encoding(text, _PIECE if self.byte_level else _LARGEST_PIECE)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def encode_slowly(self, text: str) -> list[int]:
        """What `encode` must return, by one call of the library: the twin for tests."""
        return self._run(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special tokens and ids outside the vocabulary give none.

        Bytes that are not UTF-8 (half of a character at an end) become U+FFFD.
        """
        if self.token_bytes is not None:
            return self.decode_bytes(ids).decode("utf-8", "replace")
        return self._inner.decode([int(token) for token in ids], skip_special_tokens=True)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of token ids: exact for a byte-level tokenizer, half characters included."""
        table = self.token_bytes
        if table is None:
            return self.decode(ids).encode()
        size = len(table)
        return b"".join(table[token] for token in ids if 0 <= token < size)

    def count_bytes(self, ids: np.ndarray) -> int:
        """The number of bytes `decode_bytes` gives."""
        lengths = self._byte_lengths
        return int(lengths[ids].sum()) if lengths is not None else len(self.decode_bytes(ids))

    @property
    def byte_level(self) -> bool:
        return self.token_bytes is not None

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...] | None:
        """The bytes of every token id (special ones: none), or None if not byte-level."""
        decoder = json.loads(self.definition)["decoder"] or {}
        steps = decoder.get("decoders", [decoder])
        if [step.get("type") for step in steps] != ["ByteLevel"]:
            return None
        of_character = {character: byte for byte, character in enumerate(_byte_characters())}
        added = self._inner.get_added_tokens_decoder()
        table = [b""] * self.vocab_size
        for token, number in self._inner.get_vocab(with_added_tokens=True).items():
            if number in added:
                table[number] = b"" if added[number].special else token.encode()
            elif all(character in of_character for character in token):
                table[number] = bytes(of_character[character] for character in token)
            else:
                return None
        table[self.eos_id] = b""
        return tuple(table)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and, with the end-of-sequence token, tokenizer_config.json."""
        with atomic_write(folder / TOKENIZER_FILE) as file:
            file.write(self.definition.encode())
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eos_token}
        write_json(folder / TOKENIZER_CONFIG_FILE, config)

    @cached_property
    def _byte_lengths(self) -> np.ndarray | None:
        if self.token_bytes is None:
            return None
        return np.array([len(token) for token in self.token_bytes], np.int64)

    @cached_property
    def _splits_as_words(self) -> bool:
        """Whether `_WORDS` splits ASCII texts as this tokenizer does, so words can be remembered.

        Words are then independent, and most of a text is words met before.
        """
        parts = json.loads(self.definition)
        split = parts["pre_tokenizer"] or {}
        return (
            self.byte_level
            and parts["model"]["type"] == "BPE"
            and parts["normalizer"] is None
            and split.get("type") == "ByteLevel"
            and split.get("add_prefix_space") is False
            and split.get("use_regex", True) is True
            and all(token["special"] for token in parts["added_tokens"])
        )

    def _encode_fast(self, piece: str) -> Iterable[int]:
        if self._splits_as_words and piece.isascii():
            return chain.from_iterable(map(self._words.__getitem__, _WORDS.findall(piece)))
        return self._encode_piece(piece)

    def _encode_piece(self, piece: str) -> list[int]:
        ids = self._run(piece)
        if self.eos_id in ids:
            # A token that is not marked special is found in texts all the same: cut its name.
            first, second = self.eos_token[:1], self.eos_token[1:]
            parts = piece.split(self.eos_token)
            texts = [second * (number > 0) + part + first for number, part in enumerate(parts)]
            texts[-1] = texts[-1].removesuffix(first)
            ids = [token for text in texts for token in self._run(text)]
            if self.eos_id in ids:
                raise DataError(
                    f"a text holds {self.eos_token!r}, which this tokenizer cannot tell from its "
                    "end-of-sequence token; choose another one with --eos-token"
                )
        return ids

    def _run(self, text: str) -> list[int]:
        try:
            return self._inner.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except TypeError as error:
            raise DataError(
                "the text holds half of a surrogate pair and cannot be encoded; "
                "replace what is not valid Unicode"
            ) from error

    def _special_tokens(self) -> list[str]:
        added = self._inner.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special]


class _Words(dict[str, tuple[int, ...]]):
    """Token ids of words already met; forgets all when too many, so memory stays bounded."""

    def __init__(self, encode: Any) -> None:
        super().__init__()
        self._encode = encode

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple(self._encode(word))
        if len(word) <= _WORD_LENGTH:
            if len(self) >= _WORDS_KEPT:
                self.clear()
            self[word] = ids
        return ids


def cut_for_encoding(text: str, size: int) -> Iterator[str]:
    """`text` in pieces of about `size` characters, cut where no token can cross.

    A text without such a place is cut after `_LARGEST_PIECE` characters wherever that is.
    """
    start = 0
    while len(text) - start > size:
        cut = _NEUTRAL_CUT.search(text, start + size, start + _LARGEST_PIECE)
        end = cut.end() if cut else min(start + _LARGEST_PIECE, len(text))
        yield text[start:end]
        start = end
    if start < len(text) or not text:
        yield text[start:]


def library() -> Any:
    """The `tokenizers` module; this file is the only one that imports it."""
    try:
        import tokenizers
    except ImportError as error:
        raise MissingPackage("tokenizers", "tokenizing text", "data") from error
    return tokenizers


def _byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _find_eos(file: Path, inner: Any) -> str:
    for name in (TOKENIZER_CONFIG_FILE, "special_tokens_map.json"):
        try:
            value = json.loads((file.parent / name).read_bytes()).get("eos_token")
        except (OSError, ValueError, AttributeError):
            continue
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str) and inner.token_to_id(value) is not None:
            return value
    special = [t.content for t in inner.get_added_tokens_decoder().values() if t.special]
    likely = [token for token in _LIKELY_ENDS if token in special]
    if len(likely) != 1:
        raise DataError(
            f"tokenizer {file} does not say which token ends a document; "
            f"name it with --eos-token{_offer(likely or special)}"
        )
    return likely[0]


def _offer(names: Sequence[str]) -> str:
    return f" (special tokens: {', '.join(names[:8])})" if names else ""
