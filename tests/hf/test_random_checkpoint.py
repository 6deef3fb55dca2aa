"""Random checkpoints: the published sizes, the same values as `initialise`, and little memory."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sambay.errors import ConfigError
from sambay.files import WriteFailed
from sambay.hf import official
from sambay.hf.loading import load_model
from sambay.hf.random_checkpoint import Layout, plan_random, write_random_checkpoint
from sambay.model import LanguageModel, initialise
from sambay.model.folder import stored_name
from sambay.spec import InitScheme, ModelConfig, presets
from tests.tiny import NAMES, tiny_config

FLASH_TINY: dict[str, Any] = {
    "layer_pattern": "2x(M S) M F G C", "hidden_size": 48, "num_heads": 8, "num_kv_heads": 4,
    "head_dim": 6, "attention_scale": 1 / math.sqrt(6), "intermediate_size": 76, "vocab_size": 61,
    "window": 5,
}  # fmt: skip


def tiny_flash() -> ModelConfig:
    return presets.phi4_mini_flash(**FLASH_TINY)


def test_the_released_model_in_the_official_layout() -> None:
    """434 names and 7,706,608,640 bytes are those of the published index; nothing is drawn."""
    values, plans = plan_random(presets.phi4_mini_flash(), Layout.OFFICIAL, dtype=torch.bfloat16)
    assert values["torch_dtype"] == "bfloat16"
    assert len({plan.name for plan in plans}) == len(plans) == 434
    assert sum(math.prod(plan.shape) for plan in plans) == 3_852_562_944
    assert sum(plan.nbytes for plan in plans) == 7_706_608_640
    wide = [plan for plan in plans if plan.dtype is torch.float32]
    assert {plan.name.split(".")[-1] for plan in wide} == {
        "A_log", "lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2",
    }  # fmt: skip
    assert len(wide) == 9 + 4 * 16
    assert {plan.dtype for plan in plans} == {torch.float32, torch.bfloat16}


def test_the_released_model_in_the_native_layout() -> None:
    _, plans = plan_random(presets.phi4_mini_flash(), Layout.NATIVE, dtype=torch.bfloat16)
    assert sum(math.prod(plan.shape) for plan in plans) == 3_852_562_944
    assert len(plans) == 434 + 2 * 9  # the joint projections of nine layers are two here


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme", [InitScheme.STANDARD, InitScheme.MUP_RELEASED])
def test_values_are_those_of_initialise(name: str, scheme: InitScheme, tmp_path: Path) -> None:
    config = tiny_config(name, tie_embeddings=False)
    write_random_checkpoint(
        tmp_path / "model", config, Layout.NATIVE, dtype=torch.float32, seed=5, scheme=scheme
    )
    model = LanguageModel(config)
    initialise(model, scheme, seed=5)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    parameters = dict(model.named_parameters())
    assert stored.keys() == {stored_name(name) for name in parameters}
    for parameter_name, parameter in parameters.items():
        assert torch.equal(stored[stored_name(parameter_name)], parameter), parameter_name
    assert load_model(tmp_path / "model").config == config


def test_both_layouts_hold_the_same_model(tmp_path: Path) -> None:
    config = tiny_flash()
    for layout in Layout:
        write_random_checkpoint(
            tmp_path / layout, config, layout, seed=2, scheme=InitScheme.STANDARD,
            max_shard_bytes=50_000,
        )  # fmt: skip
    models = [load_model(tmp_path / layout, torch.bfloat16) for layout in Layout]
    expected = LanguageModel(config)
    initialise(expected, InitScheme.STANDARD, seed=2)
    ours, theirs = (dict(model.named_parameters()) for model in models)
    for name, parameter in expected.bfloat16().named_parameters():
        assert torch.equal(ours[name], parameter)
        if name.endswith("dt_bias"):  # float32 there, in the dtype of the model officially
            assert torch.equal(theirs[name], parameter.bfloat16().float())
        else:
            assert torch.equal(theirs[name], parameter), name


def test_seeds_differ_and_repeat(tmp_path: Path) -> None:
    for number, seed in enumerate((1, 1, 2)):
        write_random_checkpoint(tmp_path / str(number), tiny_flash(), Layout.OFFICIAL, seed=seed)
    files = [(tmp_path / str(n) / "model.safetensors").read_bytes() for n in range(3)]
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_nothing_is_replaced_and_no_disk_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("x")
    for name, message in (
        ("there", "there exists already; remove it or choose another"),
        ("there/file", "file exists already"),
        ("there/file/model", "file is a file; choose another"),
    ):
        with pytest.raises(WriteFailed, match=message):
            write_random_checkpoint(tmp_path / name, tiny_flash(), Layout.NATIVE)
    (tmp_path / "empty").mkdir()
    write_random_checkpoint(tmp_path / "empty", tiny_flash(), Layout.NATIVE)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(WriteFailed, match=r"new/model needs 0.0 GB, 0.0 GB are free"):
        write_random_checkpoint(tmp_path / "new" / "model", tiny_flash(), Layout.NATIVE)
    assert not (tmp_path / "new").exists()


def test_what_does_not_fit_the_official_layout(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="norm = rms does not fit"):
        write_random_checkpoint(tmp_path / "model", tiny_config("sambay+da"), Layout.OFFICIAL)
    assert list(tmp_path.iterdir()) == []


_MEASURE = """
import sys, torch
from pathlib import Path
from sambay.hf.loading import load_model
from sambay.model.folder import stored_tensors

def status(key):
    text = open("/proc/self/status").read()
    return int(text.split(key + ":")[1].split()[0]) * 1024

warm, *cases = sys.argv[1:]
for case in cases:
    folder, dtype = case.split(":")
    load_model(warm, getattr(torch, dtype))  # code and small buffers
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    model = load_model(folder, getattr(torch, dtype))
    size = sum(tensor.nbytes for tensor in stored_tensors(model).values())
    print(size, status("VmHWM") - before)
    del model
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks the Linux kernel")
@pytest.mark.parametrize(
    "layouts",
    [
        [(Layout.OFFICIAL, "bfloat16", ("bfloat16", "float32"))],
        pytest.param(
            [
                (Layout.OFFICIAL, "float32", ("bfloat16",)),
                (Layout.NATIVE, "bfloat16", ("bfloat16", "float32")),
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["official", "others"],
)
def test_a_load_needs_little_more_than_the_model(
    layouts: list[tuple[Layout, str, tuple[str, ...]]], tmp_path: Path
) -> None:
    """At most 1.15 times the model, and never much less, which would mean it was not measured.

    Half of this model is its embedding, so a second copy of the largest tensor would show.
    """
    big = tiny_flash().replace(
        hidden_size=512, num_heads=8, num_kv_heads=4, head_dim=64, attention_scale=0.125,
        intermediate_size=1024, vocab_size=60_000,
    )  # fmt: skip
    cases = []
    for layout, stored, wanted in layouts:
        folder = tmp_path / f"{layout}-{stored}"
        write_random_checkpoint(
            folder, big, layout, dtype=getattr(torch, stored), max_shard_bytes=40 << 20
        )
        cases += [f"{folder}:{dtype}" for dtype in wanted]
    write_random_checkpoint(tmp_path / "warm", tiny_flash(), Layout.OFFICIAL)
    command = [sys.executable, "-c", _MEASURE, str(tmp_path / "warm"), *cases]
    # Memory of a deleted model goes back at once, or the next one would seem to need less.
    allocator = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": "0"}
    run = subprocess.run(
        command, env=os.environ | allocator, capture_output=True, text=True, check=True
    )
    for case, line in zip(cases, run.stdout.splitlines(), strict=True):
        size, peak = map(int, line.split())
        assert size > 80 << 20
        assert 0.9 * size < peak < 1.15 * size, case


def test_the_folder_is_complete(tmp_path: Path) -> None:
    write_random_checkpoint(
        tmp_path / "model", tiny_flash(), Layout.OFFICIAL, max_shard_bytes=100_000
    )
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    _, plans = plan_random(tiny_flash(), Layout.OFFICIAL, dtype=torch.bfloat16)
    assert index["weight_map"].keys() == {plan.name for plan in plans}
    assert index["metadata"]["total_size"] == sum(plan.nbytes for plan in plans)
    assert official.read(tmp_path / "model")[0] == tiny_flash()
