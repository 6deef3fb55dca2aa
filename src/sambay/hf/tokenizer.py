"""The tokenizer of a model folder, and the tokens that end an answer; nothing is ever downloaded.

Folders in the transformers layout are read as they are: tokenizer.json, tokenizer_config.json,
special_tokens_map.json, generation_config.json, config.json.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sambay.data.tokenizer import END_OF_TEXT, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, Tokenizer
from sambay.errors import DataError

GENERATION_FILE, CONFIG_FILE = "generation_config.json", "config.json"

# Source: the tokenizer of microsoft/Phi-4-mini-flash-reasoning.
PHI4_TOKENS = {
    "<|endoftext|>": 199999,
    "<|endofprompt|>": 200018,
    "<|assistant|>": 200019,
    "<|end|>": 200020,
    "<|user|>": 200021,
    "<|system|>": 200022,
    "<|tool|>": 200023,
    "<|/tool|>": 200024,
    "<|tool_call|>": 200025,
    "<|/tool_call|>": 200026,
    "<|tool_response|>": 200027,
    "<|tag|>": 200028,
}
# The GPT-4o tokenizer itself, which the official config.json names, has the first two only.
_GPT4O_TOKENS = dict(list(PHI4_TOKENS.items())[:2])


@dataclass(frozen=True)
class ControlToken:
    """A token that stands for no text: `strips_left`, `strips_right` drop white space beside it."""

    name: str
    id: int
    strips_left: bool
    strips_right: bool


def find_tokenizer(folder: Path, given: Path | None = None) -> Path:
    """The tokenizer.json of a model folder, or the one in `given` (a file, or a folder with one).

    Raises:
        DataError: there is none; if the model names one on a remote hub, says which.
    """
    if given is not None:
        file = given / TOKENIZER_FILE if given.is_dir() else given
        if not file.is_file():
            raise DataError(
                f"--tokenizer {given}: there is no {file}; give a {TOKENIZER_FILE} or a folder "
                "that has one"
            )
        return file
    file = folder / TOKENIZER_FILE
    if file.is_file():
        return file
    remote = _remote_name(folder)
    if remote is not None:
        raise DataError(
            f"{folder} has no {TOKENIZER_FILE}; it names its tokenizer only as the remote "
            f"'{remote}': download {TOKENIZER_FILE} and {TOKENIZER_CONFIG_FILE} of that repository "
            "(or of the model's own) into the folder, or give --tokenizer PATH"
        )
    raise DataError(
        f"{folder} has no {TOKENIZER_FILE}; copy the one that belongs to the model there, "
        "or give --tokenizer PATH"
    )


def load_tokenizer(file: Path, model_folder: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json; its end-of-sequence token is that of the model.

    That is named beside the file, or is <|endoftext|> where there is one, or is given by number in
    the model folder's generation_config.json or config.json.

    Raises:
        DataError: not a tokenizer, or no certain end-of-sequence token.
        MissingPackage: `tokenizers` is not installed.
    """
    try:
        definition = json.loads(file.read_bytes())
        added = {token["content"]: token["id"] for token in definition["added_tokens"] or ()}
        vocabulary = definition["model"].get("vocab")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return Tokenizer.load(file)  # which says what is wrong with it
    known = added.keys() | set(vocabulary if isinstance(vocabulary, dict) else ())
    eos_token = _eos_token(file.parent, model_folder, added, known)
    if not isinstance(vocabulary, dict):
        return Tokenizer.load(file, eos_token)
    # The library numbers added tokens without a gap, whatever the file says, unless they are also
    # in the vocabulary; GPT-4o's stand behind gaps.
    homeless = {name: number for name, number in added.items() if name not in vocabulary}
    if added == _GPT4O_TOKENS:
        missing = {name: PHI4_TOKENS[name] for name in PHI4_TOKENS.keys() - added.keys()}
        definition["added_tokens"] += [_added_token(*item) for item in missing.items()]
        homeless |= missing
    first = max(vocabulary.values(), default=-1) + 1
    numbers = list(range(first, first + len(homeless)))
    if not homeless or (first == len(vocabulary) and list(homeless.values()) == numbers):
        return Tokenizer.load(file, eos_token)
    vocabulary |= homeless
    return Tokenizer(json.dumps(definition), eos_token)


def control_tokens(tokenizer: Tokenizer) -> dict[str, ControlToken]:
    """The tokens by name that a text must never produce.

    Special ones, and added ones that look like markers (<|tool|>, [INST]) though not declared
    special; other added tokens, such as runs of blanks, are text.
    """
    return {
        token["content"]: ControlToken(
            token["content"], token["id"], bool(token["lstrip"]), bool(token["rstrip"])
        )
        for token in json.loads(tokenizer.definition)["added_tokens"]
        if token["special"] or _looks_like_a_marker(token["content"])
    }


def end_token_ids(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end a generated text.

    From generation_config.json, else config.json (`eos_token_id`, a number or a list), else the
    tokenizer's end-of-sequence token.

    Raises:
        DataError: an `eos_token_id` that is neither, or a damaged file.
    """
    for name in (GENERATION_FILE, CONFIG_FILE):
        ids = _eos_ids(folder / name)
        if ids:
            return frozenset(ids)
    return frozenset({tokenizer.eos_id})


def context_limit(model_folder: Path, tokenizer_folder: Path) -> int | None:
    """The most tokens a text should have, or None if nothing in the folders says.

    The lower of `model_max_length` in tokenizer_config.json and `max_position_embeddings` in
    config.json; transformers writes a number of thirty digits where the former is unknown.
    """
    known = (
        read_settings(tokenizer_folder / TOKENIZER_CONFIG_FILE).get("model_max_length"),
        read_settings(model_folder / CONFIG_FILE).get("max_position_embeddings"),
    )
    return min((int(n) for n in known if isinstance(n, int | float) and 0 < n < 1e9), default=None)


def read_settings(file: Path) -> dict[str, Any]:
    """The content of a JSON file, empty if there is none.

    Raises:
        DataError: the file is damaged.
    """
    try:
        values = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}); get another copy of it") from error
    if not isinstance(values, dict):
        raise DataError(f"{file} holds no JSON object; get another copy of it")
    return values


def token_name(value: object) -> str | None:
    """The name of a token in a settings file, which is a text or an object with `content`."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _remote_name(folder: Path) -> str | None:
    """The repository in `auto_map`: "owner/name", or "owner/name--module.Class"."""
    for name in (CONFIG_FILE, TOKENIZER_CONFIG_FILE):
        auto_map = read_settings(folder / name).get("auto_map")
        target = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else None
        for text in target if isinstance(target, list) else [target]:
            if isinstance(text, str):
                return text.split("--")[0]
    return None


def _eos_token(
    tokenizer_folder: Path, model_folder: Path, added: dict[str, int], known: Collection[str]
) -> str:
    for name in (TOKENIZER_CONFIG_FILE, "special_tokens_map.json"):
        token = token_name(read_settings(tokenizer_folder / name).get("eos_token"))
        if token is not None and token in known:
            return token
    if END_OF_TEXT in known:
        return END_OF_TEXT
    names = {number: name for name, number in added.items()}
    for name in (GENERATION_FILE, CONFIG_FILE):
        for number in _eos_ids(model_folder / name):
            if number in names:
                return names[number]
    raise DataError(
        f"tokenizer folder {tokenizer_folder} does not say which token ends a text; "
        f'add "eos_token" to a {TOKENIZER_CONFIG_FILE} there'
    )


def _eos_ids(file: Path) -> list[int]:
    value = read_settings(file).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in ids):
        raise DataError(
            f"{file}: eos_token_id = {value!r}; it must be a token id or a list of them"
        )
    return ids


def _looks_like_a_marker(name: str) -> bool:
    return len(name) > 2 and name[0] + name[-1] in ("<>", "[]")


def _added_token(name: str, number: int) -> dict[str, Any]:
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    return {"id": number, "content": name, **dict.fromkeys(flags, False), "special": True}
