"""docs/porting.md: its numbers are those of the reference and of our model, its examples run."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sambay.hf import key_map, official
from sambay.model import LanguageModel, ModelCache
from sambay.spec import footprint, presets
from tests.parity import float64_reference as reference
from tests.parity import formula_checkpoint as formula
from tests.parity import make_reference_logits as published

ROOT = Path(__file__).parents[2]
PAGE = published.PAGE.read_text(encoding="utf-8")
DATA: dict[str, Any] = json.loads(published.DATA_FILE.read_text(encoding="utf-8"))
PROMPTS = DATA["prompts"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("formula") / "checkpoint"
    command = [sys.executable, "-m", "tests.parity.make_reference_logits", str(path)]
    subprocess.run(command, cwd=ROOT, check=True)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    return official.load(folder)


def close(found: Any, wanted: Any, limit: float) -> bool:
    found, wanted = np.asarray(found, dtype=float), np.asarray(wanted, dtype=float)
    return bool(np.abs(found - wanted).max() <= limit * np.abs(wanted).max())


def test_the_reference_gives_the_stored_numbers_again() -> None:
    again = published.compute()
    assert again.keys() == DATA.keys()
    for key in ("config", "test_vector", "tensor_sums"):
        assert again[key] == DATA[key], key  # exact arithmetic
    for name, wanted in PROMPTS.items():
        found = again["prompts"][name]
        assert (found["ids"], found["argmax"]) == (wanted["ids"], wanted["argmax"])
        assert [token for token, _ in found["top"]] == [token for token, _ in wanted["top"]]
        assert close([value for _, value in found["top"]], [v for _, v in wanted["top"]], 1e-8)
        for key in ("sum", "sum_of_squares", "sum_of_squares_all", "hidden_norms"):
            assert close(found[key], wanted[key], 1e-8), (name, key)


def test_the_page_shows_the_stored_numbers() -> None:
    block = PAGE.split(published.BEGIN)[1].split(published.END)[0]
    assert block.strip() == published.page_block(DATA)
    sizes = re.sub(r"\s+", " ", PAGE.split("## A checkpoint from a formula")[1])
    for name, value in DATA["config"].items():
        assert f"`{name}` {value}" in sizes


def test_the_formula_in_plain_integers_gives_the_test_vector() -> None:
    """The prose of the page once more, element by element, without NumPy's arithmetic."""
    vector = DATA["test_vector"]
    h = 0xCBF29CE484222325
    for byte in vector["name"].encode("utf-8"):
        h = ((h ^ byte) * 0x100000001B3) % 2**64
    assert f"{h:016x}" == vector["fnv1a"]
    for i, (k, value) in enumerate(zip(vector["k"], vector["values"], strict=True)):
        z = (h + i * 0x9E3779B97F4A7C15) % 2**64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        assert (z ^ (z >> 31)) >> 57 == k
        assert value == (2 * k - 127) / 128 / 8
    assert formula.fnv1a("a") == 0xAF63DC4C8601EC8C  # published test vector of FNV-1a


@pytest.mark.parametrize("name", PROMPTS)
@torch.no_grad()
def test_our_model_gives_the_published_numbers(name: str, model: LanguageModel) -> None:
    wanted, norms = PROMPTS[name], []
    ids = torch.tensor([wanted["ids"]])
    hooks = [
        block.register_forward_hook(lambda _m, _i, out: norms.append(out[0][0, -1].norm().item()))
        for block in model.blocks
    ]
    logits = model(ids)[0].double()
    for hook in hooks:
        hook.remove()
    top = logits[-1].topk(len(wanted["top"]))
    assert top.indices.tolist() == [token for token, _ in wanted["top"]]
    assert close(top.values.tolist(), [value for _, value in wanted["top"]], 1e-5)
    assert logits.argmax(dim=1).tolist() == wanted["argmax"]
    assert close(logits[-1].sum(), wanted["sum"], 1e-4)  # 128 terms cancel
    assert close(logits[-1].square().sum(), wanted["sum_of_squares"], 1e-5)
    assert close(logits.square().sum(), wanted["sum_of_squares_all"], 1e-5)
    assert close(norms, wanted["hidden_norms"][1:], 1e-5)
    cache = ModelCache.allocate(model.config, 1, ids.shape[1], torch.float32, "cpu")
    steps = [model(ids[:, t : t + 1], cache=cache).argmax().item() for t in range(ids.shape[1])]
    assert steps == wanted["argmax"]


def test_the_example_for_real_weights_runs(folder: Path) -> None:
    (example,) = re.findall(r"^```python\n(.*?load_model.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert '"Phi-4-mini-flash-reasoning"' in example
    example = example.replace('"Phi-4-mini-flash-reasoning"', repr(str(folder)))
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(example, "docs/porting.md", "exec"), {})
    lines, wanted = output.getvalue().splitlines(), PROMPTS["short"]
    norms = [f"layer {i}: {norm:.6f}" for i, norm in enumerate(wanted["hidden_norms"][1:])]
    assert lines == norms + [f"{token}: {value:.9f}" for token, value in wanted["top"]]


def test_the_reference_prints_the_same_as_a_command(folder: Path) -> None:
    wanted = PROMPTS["short"]
    command = ["tests/parity/float64_reference.py", str(folder), *map(str, wanted["ids"])]
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, check=True, capture_output=True, text=True
    )
    words = [line.split() for line in result.stdout.splitlines()]
    assert [(int(token), float(value)) for token, value in words] == list(map(tuple, wanted["top"]))


def test_every_official_name_is_in_the_table_with_our_name() -> None:
    config = presets.phi4_mini_flash()
    rows = [line.split("|") for line in PAGE.splitlines() if line.startswith("| `")]
    pairs: set[tuple[str, str]] = set()
    for cells in rows:
        if len(cells) != 6:
            continue
        theirs, ours = (_alternatives(cell) for cell in cells[1:3])
        if len(ours) == 2 and len(theirs) == 2 and "kv_proj" in ours[1]:
            ours = [f"mixer.q_proj.{part}" for part in ("weight", "bias")]
        pairs |= set(zip(theirs, ours, strict=True))
    layers = {
        (rule.official.split(".", 3)[3], rule.ours[0].split(".", 2)[2])
        for rule in key_map.rules(config)
        if ".layers." in rule.official
    }
    assert pairs == layers


def _alternatives(cell: str) -> list[str]:
    """The names a cell stands for: braces spelt out."""
    names = []
    for text in re.findall(r"`([^`]+)`", cell):
        match = re.search(r"\{(.+?)\}", text)
        options = match[1].split(",") if match else [""]
        names += [re.sub(r"\{.+?\}", option, text) for option in options]
    return names


def test_sizes_on_the_page_follow_from_the_configuration() -> None:
    config = presets.phi4_mini_flash()
    di, kv = config.d_inner, 2 * config.num_kv_heads * config.head_dim * 2
    conv, state = 3 * di * 2, di * config.d_state * 4
    assert config.window is not None
    shared, windows = 32_768 * kv, 8 * config.window * kv
    for size in (conv, state, config.window * kv, kv, shared, windows, 9 * (conv + state)):
        assert f"{size:,} B" in PAGE
    assert f"{footprint.parameter_count(config):,} parameters" in PAGE
    total = footprint.cache_bytes(config, 1, 32_768, kv_bytes=2)
    assert total == shared + windows + 9 * (2 * conv + state)  # here the convolution is float32 too
    assert f"That is {footprint.prefill_share(config):.0%}".replace("%", " %") in PAGE
    shown = re.findall(r"(\d+): (0\.\d{4})", PAGE.replace("layer 1", "1"))
    assert len(shown) == 4
    for layer, value in shown:
        assert math.isclose(reference.lambda_init(int(layer)), float(value), abs_tol=6e-5)
