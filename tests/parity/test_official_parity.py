"""Our model against the independent float64 evaluation, on official checkpoints of odd sizes.

The distance is max |difference| / max |reference| over all logits of a text; 1e-4 is promised and
1e-5 is asked here, so that a loss of precision shows before the promise breaks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sambay.hf import official
from sambay.model import LanguageModel, ModelCache
from tests.parity import float64_reference as reference
from tests.parity import formula_checkpoint as formula

LIMIT = 1e-5
DIFFERENT = 0.03  # what any mistake must exceed; bfloat16 stays around it, float32 far below
TOKENS = [17, 3, 3, 60, 41, 0, 25, 9, 33, 58, 7, 12, 44, 2, 19, 5, 50]

CONFIGS: dict[str, dict[str, Any]] = {
    "groups of two": {},
    "groups of one": {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 20},
    "groups of three": {"num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 36},
    "one pair of six": {"num_attention_heads": 12, "num_key_value_heads": 2, "hidden_size": 36},
    "window of one": {"sliding_window": 1},
    "window longer than the text": {"sliding_window": 100},
    "twelve layers": {"num_hidden_layers": 12, "intermediate_size": 27, "vocab_size": 67},
    "own head": {"tie_word_embeddings": False},
}
Tensors = dict[str, np.ndarray[Any, Any]]


@pytest.fixture
def our_model(tmp_path: Path) -> Callable[..., LanguageModel]:
    """The official tensors, stored as they are published, loaded as a user would."""

    def make(
        config: dict[str, Any], values: Tensors, dtype: torch.dtype = torch.float32
    ) -> LanguageModel:
        formula.write_folder(tmp_path / "official", config, values)
        return official.load(tmp_path / "official", dtype=dtype)

    return make


def distance(ours: torch.Tensor, wanted: np.ndarray[Any, Any]) -> float:
    """max |difference| / max |reference|."""
    difference = np.abs(ours.detach().double().numpy().reshape(wanted.shape) - wanted)
    return float(difference.max() / np.abs(wanted).max())


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_equal_the_reference_however_they_are_computed(
    name: str, our_model: Callable[..., LanguageModel]
) -> None:
    config = formula.official_config(**CONFIGS[name])
    values = formula.tensors(config, salt=name)
    wanted = reference.evaluate(values, config, TOKENS).logits
    model = our_model(config, values)
    ids = torch.tensor([TOKENS])

    assert distance(model(ids), wanted) < LIMIT  # everything at once
    for length in (1, 4, len(TOKENS)):  # prefill: later layers see the last token only
        last = model(ids[:, :length], outputs="last")
        assert distance(last, wanted[length - 1]) < LIMIT
    stepped = []
    cache = ModelCache.allocate(model.config, 1, len(TOKENS), torch.float32, "cpu")
    stepped.append(model(ids[:, :3], cache=cache))  # a chunk, then token by token
    for t in range(3, len(TOKENS)):
        stepped.append(model(ids[:, t : t + 1], cache=cache, outputs="last"))
    assert distance(torch.cat(stepped, dim=1), wanted) < LIMIT


def test_the_reference_reads_a_folder_as_it_was_written(tmp_path: Path) -> None:
    """Its own reader, byte by byte, gives the numbers of the formula back; so does every spelling
    of the window."""
    config = formula.official_config(num_hidden_layers=12)
    values = formula.tensors(config)
    formula.write_folder(tmp_path, config, values)
    read, stored = reference.read_folder(tmp_path)
    assert stored == config
    assert read.keys() == values.keys()
    assert all(np.array_equal(read[name], values[name]) for name in values)
    by_layer = [5 if index in (1, 3, 5) else None for index in range(12)]
    one = reference.evaluate(read, config, TOKENS).logits
    other = reference.evaluate(read, config | {"sliding_window": by_layer}, TOKENS).logits
    assert np.array_equal(one, other)


def test_the_published_size_has_the_published_tensors() -> None:
    """434 names, 3,852,562,944 parameters and 7,706,608,640 bytes, as the published index says."""
    shapes = formula.shapes(
        formula.official_config(
            hidden_size=2560, num_hidden_layers=32, num_attention_heads=40,
            num_key_value_heads=20, intermediate_size=10_240, vocab_size=200_064,
        )
    )  # fmt: skip
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    size_in_bytes = sum(
        size * (4 if name.endswith(formula.FLOAT32_SUFFIXES) else 2) for name, size in sizes.items()
    )
    assert (len(sizes), sum(sizes.values()), size_in_bytes) == (434, 3_852_562_944, 7_706_608_640)


@torch.no_grad()
def test_in_float64_only_rounding_remains(our_model: Callable[..., LanguageModel]) -> None:
    """What float32 could hide, such as a float32 constant in a float64 computation."""
    config = formula.official_config()
    values = formula.tensors(config)
    model = our_model(config, values, torch.float64)
    wanted = reference.evaluate(values, config, TOKENS).logits
    assert distance(model(torch.tensor([TOKENS])), wanted) < 1e-12


@torch.no_grad()
def test_every_hidden_state_equals_the_reference(our_model: Callable[..., LanguageModel]) -> None:
    """An error in one layer that a later one hides would show here."""
    config = formula.official_config(num_hidden_layers=12)
    values = formula.tensors(config)
    model = our_model(config, values)
    seen: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _module, _inputs, outputs: seen.append(outputs[0]))
        for block in model.blocks
    ]
    model(torch.tensor([TOKENS]))
    for hook in hooks:
        hook.remove()
    wanted = reference.evaluate(values, config, TOKENS).hidden[1:]
    assert len(seen) == len(wanted) == 12
    assert max(map(distance, seen, wanted)) < LIMIT


Change = Callable[[Tensors, dict[str, Any], pytest.MonkeyPatch], None]


def _swap_halves(name: str) -> Change:
    def change(values: Tensors, config: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
        for key in [key for key in values if key.endswith(name)]:
            first, second = np.split(values[key], 2)
            values[key] = np.concatenate([second, first])

    return change


def _swap_tensors(one: str, other: str) -> Change:
    def change(values: Tensors, config: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
        for key in [key for key in values if key.endswith(one)]:
            partner = key.removesuffix(one) + other
            values[key], values[partner] = values[partner], values[key]

    return change


def _replace(name: str, make: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> Change:
    def change(values: Tensors, config: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
        changed = [key for key in values if key.endswith(name)]
        assert changed
        for key in changed:
            values[key] = make(values[key])

    return change


def _window(extra: int) -> Change:
    def change(values: Tensors, config: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
        config["sliding_window"] += extra

    return change


def _step(name: str, make: Callable[..., Callable[..., Any]]) -> Change:
    def change(values: Tensors, config: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
        patch.setattr(reference, name, make(getattr(reference, name)))

    return change


def _gated_memory_with_operands_swapped(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(normed: Any, tensors: Any, memory: Any) -> Any:
        gate = reference.linear(normed, tensors, "in_proj")
        return reference.linear(gate * reference.silu(memory), tensors, "out_proj")

    return wrong


def _memory_behind_the_gate(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(u: Any, tensors: Any) -> Any:
        out, scan = right(u, tensors)
        gate = reference.halves(reference.linear(u, tensors, "in_proj"))[1]
        return out, scan * reference.silu(gate)

    return wrong


def _memory_without_the_skip(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(u: Any, tensors: Any) -> Any:
        without = {**tensors, "D": np.zeros_like(tensors["D"])}
        return right(u, tensors)[0], right(u, without)[1]

    return wrong


def _regrouped(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Rows by key head [q q k v | q q k v], the other layout in use; sizes of the default."""
    if len(rows) == 24:  # cross-attention has queries only
        return rows
    q, k, v = np.split(rows, [24, 36])
    q, k, v = (np.split(part, 2) for part in (q, k, v))
    return np.concatenate([part for group in zip(q, k, v, strict=True) for part in group])


MISTAKES: dict[str, Change] = {
    "gate and value of the MLP swapped": _swap_halves("fc1.weight"),
    "halves of in_proj swapped": _swap_halves("attn.in_proj.weight"),
    "window one longer": _window(1),
    "window one shorter": _window(-1),
    "lambda_init counted from 1": _step(
        "lambda_init", lambda right: lambda index: right(index + 1)
    ),
    "lambda_init by attention layers only": _step(
        "lambda_init", lambda right: lambda index: right(index // 2)
    ),
    "lambdas exchanged": _swap_tensors("lambda_q1", "lambda_q2"),
    "sub-norm weight ignored": _replace("subln.weight", np.ones_like),
    "norm bias ignored": _replace("layernorm.bias", np.zeros_like),
    "attention bias ignored": _replace("Wqkv.bias", np.zeros_like),
    "dt bias ignored": _replace("dt_proj.bias", np.zeros_like),
    "D ignored": _replace("attn.D", np.zeros_like),
    "convolution reversed": _replace("conv1d.weight", lambda kernel: kernel[..., ::-1]),
    "rows of Wqkv by key head": _replace("Wqkv.weight", _regrouped),
    "silu on the memory": _step("gated_memory", _gated_memory_with_operands_swapped),
    "memory behind the gate": _step("mamba", _memory_behind_the_gate),
    "memory without D": _step("mamba", _memory_without_the_skip),
    "softplus missing": _step("softplus", lambda right: lambda x: np.maximum(x, 0)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@torch.no_grad()
def test_each_known_mistake_would_show(
    mistake: str, our_model: Callable[..., LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = formula.official_config()
    values = formula.tensors(config)
    model = our_model(config, values)
    logits = model(torch.tensor([TOKENS]))
    assert distance(logits, reference.evaluate(values, config, TOKENS).logits) < LIMIT
    MISTAKES[mistake](values, config, monkeypatch)
    assert distance(logits, reference.evaluate(values, config, TOKENS).logits) > DIFFERENT
