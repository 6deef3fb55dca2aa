"""The reference numbers of docs/porting.md.

python -m tests.parity.make_reference_logits            # writes the numbers again
python -m tests.parity.make_reference_logits FOLDER     # writes the checkpoint they are of
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.parity import float64_reference as reference
from tests.parity import formula_checkpoint as formula

DATA_FILE = Path(__file__).with_name("reference_logits.json")
PAGE = Path(__file__).parents[2] / "docs" / "porting.md"
BEGIN, END = "<!-- reference logits: begin -->", "<!-- reference logits: end -->"

# Twelve layers M S M S M S M F U X U X: two readers of each shared tensor, three windows.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 8,
    "num_hidden_layers": 12,
    "num_key_value_heads": 4,
    "sliding_window": 8,
    "vocab_size": 128,
}
# Shorter than the convolution, longer than the window once, and five times.
PROMPTS = {"short": [5, 77, 31], "medium": [(7 * i + 3) % 128 for i in range(12)],
           "long": [(i * i + 11 * i + 1) % 128 for i in range(40)]}  # fmt: skip
NUM_TOP = 8


_SUMMED = (
    "model.embed_tokens.weight",
    "model.layers.0.attn.A_log",
    "model.layers.0.attn.conv1d.weight",
    "model.layers.0.attn.dt_proj.bias",
    "model.layers.1.attn.Wqkv.bias",
    "model.layers.1.attn.inner_cross_attn.lambda_q1",
    "model.layers.1.attn.inner_cross_attn.subln.weight",
    "model.layers.11.mlp.fc2.weight",
    "model.final_layernorm.weight",
)


def compute() -> dict[str, Any]:
    """Everything that is published, as JSON values."""
    config = formula.official_config(**SIZES)
    tensors = formula.tensors(config)
    return {
        "config": SIZES,
        "test_vector": {
            "name": "model.embed_tokens.weight",
            "fnv1a": f"{formula.fnv1a('model.embed_tokens.weight'):016x}",
            "k": formula.hashed_bits("model.embed_tokens.weight", 8).tolist(),
            "values": tensors["model.embed_tokens.weight"].reshape(-1)[:8].tolist(),
        },
        "tensor_sums": {name: float(tensors[name].sum()) for name in _SUMMED},
        "prompts": {name: _prompt(tensors, config, ids) for name, ids in PROMPTS.items()},
    }


def _prompt(tensors: reference.Tensors, config: dict[str, Any], ids: list[int]) -> dict[str, Any]:
    result = reference.evaluate(tensors, config, ids)
    last = result.logits[-1]
    top = np.argsort(-last)[:NUM_TOP]
    return {
        "ids": ids,
        "top": [[int(token), round(float(last[token]), 9)] for token in top],
        "sum": round(float(last.sum()), 9),
        "sum_of_squares": round(float((last**2).sum()), 9),
        "sum_of_squares_all": round(float((result.logits**2).sum()), 9),
        "hidden_norms": [round(float(np.linalg.norm(h[-1])), 9) for h in result.hidden],
        "argmax": [int(token) for token in result.logits.argmax(axis=1)],
    }


def page_block(data: dict[str, Any]) -> str:
    """The part of docs/porting.md between the two marks."""
    vector = data["test_vector"]
    lines = [
        f"Test vector: the FNV-1a hash of `{vector['name']}` is `0x{vector['fnv1a']}`; its first "
        f"eight k are {_list(vector['k'])} and its first eight values {_list(vector['values'])}.",
        "",
        "| tensor | sum of its elements |",
        "| --- | --- |",
        *(f"| `{name}` | {value!r} |" for name, value in data["tensor_sums"].items()),
    ]
    for name, prompt in data["prompts"].items():
        lines += [
            "",
            f"**{name}**, {len(prompt['ids'])} tokens: {_list(prompt['ids'])}",
            "",
            "| rank | id | logit |",
            "| --- | --- | --- |",
            *(
                f"| {rank} | {token} | {value:.9f} |"
                for rank, (token, value) in enumerate(prompt["top"], start=1)
            ),
            "",
            f"Last position: sum {prompt['sum']:.9f}, sum of squares "
            f"{prompt['sum_of_squares']:.9f}; sum of squares over all positions "
            f"{prompt['sum_of_squares_all']:.9f}. Largest logit after each position: "
            f"{_list(prompt['argmax'])}.",
            "",
            "Euclidean norm of the residual at the last position after the embedding and after "
            f"each layer: {', '.join(f'{norm:.6f}' for norm in prompt['hidden_norms'])}.",
        ]
    return "\n".join(lines)


def _list(values: Sequence[Any]) -> str:
    return ", ".join(str(value) for value in values)


def write_checkpoint(folder: Path) -> None:
    """Write the formula checkpoint in the official format."""
    config = formula.official_config(**SIZES)
    formula.write_folder(folder, config, formula.tensors(config))


def write_numbers() -> None:
    """Write the data file and the block of the page."""
    data = compute()
    DATA_FILE.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{page_block(data)}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        write_checkpoint(Path(sys.argv[1]))
    else:
        write_numbers()
