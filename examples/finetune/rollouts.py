"""Training data as JSON lines: one object a line, checked before anything is loaded.

A conversation is a list of {"role": ..., "content": ...} that ends with an answer of the assistant.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from sambay.errors import ConfigError, DataError

ROLES = ("system", "user", "assistant")
Row = dict[str, Any]


def document(row: Row) -> Row:
    """For mid-training: {"text": ...}, or {"messages": [...]} with the whole rollout."""
    if "text" in row and "messages" not in row:
        return {"text": _text(row, "text")}
    return {"messages": _conversation(row)}


def answer(row: Row) -> Row:
    """For SFT: {"messages": [...]}; the last answer is what is learned."""
    messages = _conversation(row)
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def preference(row: Row) -> Row:
    """For DPO: {"prompt": ..., "chosen": ..., "rejected": ...}: a correct and an incorrect rollout.

    The prompt is a question or a list of messages that ends with one.
    """
    prompt = _field(row, "prompt")
    if isinstance(prompt, list):
        _check(prompt, "prompt", last="user")
    else:
        prompt = [{"role": "user", "content": _text(row, "prompt")}]
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if chosen == rejected:
        raise DataError("'chosen' and 'rejected' are equal; a pair needs a better and a worse one")
    said = ({"role": "assistant", "content": text} for text in (chosen, rejected))
    return {"prompt": prompt, "chosen": [next(said)], "rejected": [next(said)]}


def read(file: Path, parse: Callable[[Row], Row]) -> Dataset:
    """The rows of a file, each as `parse` understands it; empty lines do not count.

    Raises:
        DataError: a file or line that cannot be used, naming it.
    """
    count = sum(1 for _ in _rows(file, parse))
    if count == 0:
        raise DataError(f"{file} has no rows; give one JSON object a line")
    stamp = file.stat()  # part of the key under which datasets keeps what it made
    options = {"file": file, "parse": parse, "stamp": (stamp.st_mtime_ns, stamp.st_size)}
    dataset = Dataset.from_generator(_rows, gen_kwargs=options)
    assert isinstance(dataset, Dataset)
    return dataset


def drop_long(dataset: Any, tokenizer: Any, limit: int, *answers: str) -> Any:
    """Without rows longer than `limit`: an answer cut in the middle teaches never to finish."""

    def fits(row: dict[str, Any]) -> bool:
        rows = [row["prompt"] + row[name] for name in answers]
        ids = tokenizer.apply_chat_template(rows, tokenize=True, return_dict=False)
        return max(map(len, ids)) <= limit

    kept = dataset.filter(fits, desc="Dropping long rows")
    if len(kept) < len(dataset):
        print(f"dropped {len(dataset) - len(kept)} of {len(dataset)} rows above {limit} tokens")
    if len(kept) == 0:
        raise ConfigError(f"--max-length {limit}: every row is longer; raise it")
    return kept


def _rows(file: Path, parse: Callable[[Row], Row], stamp: Any = None) -> Iterator[Row]:
    if not file.is_file():
        raise DataError(f"{file} does not exist; give a file of JSON lines with --data")
    fields = None
    with file.open(encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                row = _parsed(line, parse, f"{file}:{number}")
                if fields not in (None, row.keys()):
                    raise DataError(
                        f"{file}:{number}: other fields than in the lines before; give all "
                        f"lines {' and '.join(fields)}"
                    )
                fields = row.keys()
                yield row
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8 ({error.reason}); convert it first") from error


def _parsed(line: str, parse: Callable[[Row], Row], where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}); give one object a line") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: a {type(row).__name__}; give one JSON object a line")
    try:
        return parse(row)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _field(row: Row, name: str) -> Any:
    if name not in row:
        found = ", ".join(map(repr, row)) or "nothing"
        raise DataError(f"the field '{name}' is missing (found {found}); add it")
    return row[name]


def _text(row: Row, name: str) -> str:
    value = _field(row, name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"the field '{name}' must be text that is not empty")
    return value


def _conversation(row: Row) -> list[Row]:
    messages = _field(row, "messages")
    _check(messages, "messages", last="assistant")
    if len(messages) < 2:
        raise DataError("'messages' holds an answer only; put the question before it")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _check(messages: Any, name: str, last: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"'{name}' must be a list of messages with role and content")
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise DataError(f"{name}[{place}] needs a 'role' that is one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            raise DataError(f"{name}[{place}] needs a 'content' that is text and not empty")
    if messages[-1]["role"] != last:
        raise DataError(f"'{name}' must end with a message of the {last}")
