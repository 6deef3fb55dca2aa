"""Small texts that are the same on every machine, and sets made of them."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

from sambay.data.prepare import Prepared, prepare
from sambay.data.settings import PrepareSettings

WORDS = ["state", "space", "gate", "memory", "héllo", "scan", "日本", "x = 1\n", "\n\n    y", "🙂"]


def write_texts(folder: Path, count: int, seed: int = 0) -> Path:
    """`count` text files of 20 to 2,000 characters, in two folders."""
    generator = random.Random(seed)
    for number in range(count):
        path = folder / ("deep/er" if number % 3 else "") / f"{number:03d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        words = generator.choices(WORDS, k=generator.randrange(5, 400))
        path.write_text(f"{number} " + " ".join(words), encoding="utf-8", newline="")
    return folder


def contents(folder: Path) -> dict[str, str]:
    """A fingerprint of every file below a folder, hidden ones included."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def make(source: Path, out: Path, **fields: Any) -> Prepared:
    """Prepare with small shards and an even validation share, unless told otherwise."""
    running = {key: fields.pop(key) for key in ("workers", "force", "progress") if key in fields}
    if "tokenizer" not in fields:
        fields.setdefault("vocab_size", 300)
    fields = {"validation_fraction": 0.2, "shard_tokens": 2000, **fields}
    return prepare([source], out, PrepareSettings(**fields), **running)
