"""Several processes compute what one computes, and continue what another number began."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sambay.errors import ConfigError
from sambay.layers.mamba import Mamba
from sambay.layers.projection import Linear
from sambay.model import LanguageModel, initialise
from sambay.model.folder import load_model_folder
from sambay.train import checkpoint
from sambay.train.checkpoint import CheckpointStore
from sambay.train.config import (
    ActivationCheckpointing,
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    Packing,
    ParallelConfig,
    Precision,
    RunConfig,
    ScheduleConfig,
)
from sambay.train.distributed import joined, sizes_for
from sambay.train.loop import train
from sambay.train.metrics import read_metrics
from sambay.train.parallel import build_model
from sambay.train.pieces import pieces_of
from tests.tiny import tiny_config
from tests.train.conftest import SEQUENCE
from tests.train.processes import together
from tests.train.test_resume import StopAt, assert_same_run, final_tensors

MakeConfig = Callable[..., RunConfig]
BATCH = 8
SLOW = pytest.mark.slow
SOON = {"checkpoint": CheckpointConfig(every_steps=100)}  # the last step only


@pytest.fixture
def make(make_config: MakeConfig) -> MakeConfig:
    """Runs whose batch 1, 2 and 4 processes can share."""

    def make(name: str = "sambay", steps: int = 4, **fields: Any) -> RunConfig:
        tokens = BATCH * SEQUENCE
        fields = {"batch": BatchConfig(BATCH, BATCH), **SOON, **fields}
        schedule = ScheduleConfig(steps * tokens, warmup_tokens=2 * tokens)
        return make_config(name, schedule=schedule, **fields)

    return make


def run(count: int, config: RunConfig, run_dir: Path, **options: Any) -> list[dict[str, Any]]:
    """The metrics of a run by `count` processes; one is this process itself."""

    def action() -> None:
        train(config, run_dir, **options)

    if count == 1:
        action()
    else:
        together(count, action, run_dir.with_name(f"{run_dir.name} answers"))
    return read_metrics(run_dir)


def assert_close(mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    for one, other in zip(mine, theirs, strict=True):
        for name in ("loss", "validation_loss", "validation_bits_per_byte"):
            assert one.get(name) == pytest.approx(other.get(name), abs=1e-5), (one["step"], name)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("count", "steps"),
    [(2, 12), pytest.param(2, 50, marks=SLOW), pytest.param(4, 50, marks=SLOW)],
)
def test_many_processes_learn_what_one_learns(
    count: int, steps: int, make: MakeConfig, tmp_path: Path
) -> None:
    config = make(steps=steps)
    alone = run(1, config, tmp_path / "one")
    assert_close(run(count, config, tmp_path / "many"), alone)
    assert alone[0]["loss"] - alone[-1]["loss"] > 1
    models = [load_model_folder(tmp_path / name / "model") for name in ("one", "many")]
    first, second = (dict(model.named_parameters()) for model in models)
    assert first.keys() == second.keys()
    for name, parameter in first.items():
        assert torch.allclose(parameter, second[name], atol=1e-4), name


def test_replicas_of_shards(make: MakeConfig, tmp_path: Path) -> None:
    """Two copies of the model on two processes each; batches in pieces; documents apart.

    Recomputed on the way back as well, with an untied head.
    """
    data = DataConfig(
        make().data.directory, SEQUENCE, separate_documents=True, packing=Packing.BEST_FIT
    )
    config = make(
        "sambay+da",
        steps=2,
        data=data,
        batch=BatchConfig(BATCH, 1),
        parallel=ParallelConfig(replicate=2),
        activation_checkpointing=ActivationCheckpointing.SELECTIVE,
        model=tiny_config("sambay+da", vocab_size=make().model.vocab_size, tie_embeddings=False),
    )
    alone = replace(config, parallel=ParallelConfig())
    assert_close(run(4, config, tmp_path / "four"), run(1, alone, tmp_path / "one"))


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_in_shards(recompute: str, make: MakeConfig, tmp_path: Path) -> None:
    config = make(
        "sambay+da",
        steps=3,
        activation_checkpointing=ActivationCheckpointing(recompute),
        model=tiny_config("sambay+da", vocab_size=make().model.vocab_size, tie_embeddings=False),
    )
    assert_close(run(2, config, tmp_path / "two"), run(1, config, tmp_path / "one"))


@pytest.mark.slow
def test_compiled_blocks_in_shards(make: MakeConfig, tmp_path: Path) -> None:
    config = make(steps=2, compile=True)
    alone = run(1, replace(config, compile=False), tmp_path / "one")
    assert_close(run(2, config, tmp_path / "two"), alone)


def test_bfloat16_agrees_and_the_recurrence_stays_float32(
    make: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tmp_path / "seen"
    mix, multiply = Mamba.forward, Linear.forward

    def mixing(self: Mamba, *args: Any) -> Any:
        for name in ("A_log", "D", "dt_bias", "conv_weight"):
            assert getattr(self, name).dtype is torch.float32, name
        return mix(self, *args)

    def multiplying(self: Linear, x: torch.Tensor) -> torch.Tensor:
        seen.write_text(str(self.weight.dtype))
        return multiply(self, x)

    monkeypatch.setattr(Mamba, "forward", mixing)
    monkeypatch.setattr(Linear, "forward", multiplying)
    config = make(steps=3, precision=Precision.BF16, batch=BatchConfig(BATCH, 4))
    two = run(2, config, tmp_path / "two")
    assert seen.read_text() == "torch.bfloat16"
    one = run(1, config, tmp_path / "one")
    assert seen.read_text() == "torch.float32"  # until autocast
    # Bit for bit until the sums over processes have rounded some weight differently.
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], abs=1e-6)
    assert two[0]["gradient_norm"] == pytest.approx(one[0]["gradient_norm"], rel=1e-6)
    assert two[-1]["loss"] == pytest.approx(one[-1]["loss"], abs=2e-3)


def test_initial_weights_do_not_depend_on_the_number_of_processes(
    make: MakeConfig, tmp_path: Path
) -> None:
    config = make(batch=BatchConfig(9, 9))
    model = LanguageModel(config.model)
    initialise(model, config.init_scheme.value, config.seed)
    wanted = dict(model.named_parameters())

    def mine() -> int:
        with joined(config) as world:
            held = 0
            for name, parameter in build_model(config, world).named_parameters():
                for part in pieces_of(parameter).parts:
                    assert torch.equal(part.values, wanted[name].detach()[part.place]), name
                    held += part.values.numel()
            return held

    held = together(3, mine, tmp_path)
    assert sum(held) == sum(parameter.numel() for parameter in wanted.values())
    assert max(held) < sum(held) / 2


@pytest.mark.parametrize(
    ("before", "after"),
    [pytest.param(*pair, marks=SLOW) for pair in ((2, 1), (1, 2), (2, 4))],
)
def test_another_number_of_processes_continues(
    before: int, after: int, make: MakeConfig, tmp_path: Path
) -> None:
    config = make(steps=6)
    run(before, config, tmp_path / "run", display=StopAt(3))
    assert CheckpointStore(tmp_path / "run", config.checkpoint).steps() == [3]
    assert_close(
        run(after, config, tmp_path / "run"),
        run(1, config, tmp_path / "whole"),
    )


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(make: MakeConfig, tmp_path: Path) -> None:
    config = make(steps=5)
    run(2, config, tmp_path / "whole")
    run(2, config, tmp_path / "cut", display=StopAt(2))
    run(2, config, tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_checkpoints_are_written_while_training_goes_on(
    count: int, make: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk: steps pass while the second one is saved, and it holds what it was then."""
    config = make(steps=5, checkpoint=CheckpointConfig(every_steps=2, keep=9, asynchronous=False))
    run(count, config, tmp_path / "waiting")
    plain = checkpoint.save_pieces
    log = tmp_path / "log"

    def slowly(*args: Any) -> None:
        deadline = time.monotonic() + 200
        if args[1].name.startswith(".step-00000002"):
            while not (log.exists() and "3" in log.read_text()) and time.monotonic() < deadline:
                time.sleep(0.01)
            with log.open("a") as file:
                file.write(" saved")
        plain(*args)

    class Noting(StopAt):
        def step(self, step: int, *rest: Any) -> None:
            with log.open("a") as file:
                file.write(f" {step}")

    monkeypatch.setattr(checkpoint, "save_pieces", slowly)
    config = replace(config, checkpoint=replace(config.checkpoint, asynchronous=True))
    run(count, config, tmp_path / "flowing", display=Noting(0))
    words = log.read_text().split()
    assert words.index("saved") > words.index("3")
    assert_same_run(tmp_path / "waiting", tmp_path / "flowing")
    for run_dir in ("waiting", "flowing"):
        for step in (4, 5):  # so that the second one is the newest
            path = CheckpointStore(tmp_path / run_dir, config.checkpoint).path(step)
            path.rename(path.with_name(f"old-{step}"))
    mine, theirs = final_tensors(tmp_path / "waiting"), final_tensors(tmp_path / "flowing")
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    ("fields", "size", "message"),
    [
        ({}, 3, "batch.global_batch_size = 8 cannot be divided"),
        ({"parallel": ParallelConfig(replicate=2, shard=2)}, 2, "parallel: replicate=2 shard=2"),
        ({"parallel": ParallelConfig(tensor=3)}, 4, "do not multiply to the 4 processes"),
        ({"parallel": ParallelConfig(tensor=4), "name": "sambay+da"}, 4, "num_kv_heads"),
        ({"parallel": ParallelConfig(tensor=8)}, 8, "num_kv_heads: 4 cannot be divided"),
        ({"parallel": ParallelConfig(tensor=2), "name": "s-gdny"}, 2, "recurrent_kind = 'gated_d"),
    ],
)
def test_sizes_that_do_not_fit_are_named(
    fields: dict[str, Any], size: int, message: str, make: MakeConfig
) -> None:
    with pytest.raises(ConfigError, match=message):
        sizes_for(make(**fields), size)
