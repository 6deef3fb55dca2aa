"""A small tokenizer.json in the shape of GPT-4o's: its split, and control tokens behind gaps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

# Words with an optional leading mark, in cases; up to three digits; punctuation; white space.
SPLIT = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
TEXT = "The user said: end the system, assistant! What is 1234 + 5678?\nCafé naïve 猫\n"
CONTROLS = {
    "<|endoftext|>": 600,
    "<|endofprompt|>": 619,
    "<|assistant|>": 620,
    "<|end|>": 621,
    "<|user|>": 622,
    "<|system|>": 623,
    "<|tool|>": 624,
    "<|tag|>": 630,
}
SIZE = 640


def definition(
    controls: dict[str, int] = CONTROLS,
    *,
    rstrip: tuple[str, ...] = (),
    not_special: tuple[str, ...] = ("<|tool|>",),
    at_home: bool = True,
) -> dict[str, Any]:
    """The content of the file; `at_home` also lists the control tokens in the vocabulary."""
    inner = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT), "removed", invert=True)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, level])  # pyright: ignore
    inner.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([TEXT] * 3, trainer)
    values = json.loads(inner.to_str())
    values["added_tokens"] = [
        {
            "id": number,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": name in rstrip,
            "normalized": False,
            "special": name not in not_special,
        }
        for name, number in controls.items()
    ]
    if at_home:
        values["model"]["vocab"] |= controls
    return values


def write(folder: Path, values: dict[str, Any] | None = None, **config: Any) -> Path:
    """Write the folder's tokenizer.json and tokenizer_config.json; the path of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(values or definition()), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return file
