"""Several processes that compute one model together, against one process."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sambay.data.batches import Batch
from sambay.errors import ConfigError
from sambay.model import LanguageModel
from sambay.model.folder import load_model_folder
from sambay.model.roles import halved_parameters
from sambay.spec import LayerKind
from sambay.train.checkpoint import CheckpointStore
from sambay.train.config import (
    ActivationCheckpointing,
    BatchConfig,
    ParallelConfig,
    Precision,
    RegularisationConfig,
    RunConfig,
)
from sambay.train.distributed import World, joined
from sambay.train.layout import sizes_for
from sambay.train.loss import IGNORE
from sambay.train.norms import role_norms
from sambay.train.parallel import fill
from sambay.train.pieces import pieces_of
from sambay.train.trainer import Trainer
from tests.tiny import tiny_config
from tests.train import test_distributed
from tests.train.conftest import SEQUENCE
from tests.train.processes import together
from tests.train.test_distributed import BATCH, assert_close, run
from tests.train.test_resume import StopAt, assert_same_run

MakeConfig = Callable[..., RunConfig]
NAMES = ["transformer++", "sambay", "sambay+da", "mambay", "sambay-a", "sambay-mlp"]
STEPS = 2
CLIP = 0.5  # below the first gradient norms, so that clipping is part of it

make = test_distributed.make


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """So that only mistakes make a difference, and not the order of sums."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def random_batch(config: RunConfig, step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(config.model.vocab_size, (BATCH, SEQUENCE + 1), generator=generator)
    labels = rows[:, 1:].clone()
    labels[0, 3], labels[1, :5] = IGNORE, IGNORE
    segments = (torch.arange(SEQUENCE) >= 6).int().expand(BATCH, -1).contiguous()
    return Batch(rows[:, :-1].contiguous(), labels, segments)


def random_weights(model: LanguageModel) -> dict[str, Callable[[], Tensor]]:
    """For every parameter a function that makes its value; nothing hides behind a zero or a one."""

    def make_value(seed: int, shape: torch.Size) -> Tensor:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return 0.5 + 0.2 * values if len(shape) == 1 else values / shape[1] ** 0.5

    return {
        name: functools.partial(make_value, number, parameter.shape)
        for number, (name, parameter) in enumerate(model.named_parameters())
    }


def learn(config: RunConfig, world: World | None = None) -> dict[str, Any]:
    """What a few steps from random weights tell on the way, and the weights they lead to."""
    trainer = Trainer(config, world)
    fill(trainer.model, random_weights(trainer.model))
    seen = []
    for step in range(STEPS):
        batch = random_batch(config, step)
        rows = trainer.world.rows(BATCH)
        assert batch.segments is not None
        mine = Batch(batch.input_ids[rows], batch.labels[rows], batch.segments[rows])
        learned = trainer.gradients(mine, step)
        norms = role_norms(trainer.model)
        trainer.update(1e-2, learned)
        evaluated = trainer.loss(random_batch(config, 99))
        seen.append([*learned, *map(float, norms.values()), float(evaluated)])
    halved = halved_parameters(trainer.model)
    weights = {
        name: [
            (part.place, part.values.clone())
            for part in pieces_of(parameter, in_halves=name in halved).parts
        ]
        for name, parameter in trainer.model.named_parameters()
    }
    return {"seen": seen, "weights": weights}


def check_equal(configs: list[RunConfig], count: int, folder: Path) -> None:
    """`count` processes learn what one learns, from the same weights to the same weights."""

    def action() -> list[dict[str, Any]]:
        with float64(), joined(configs[0]) as world:
            return [learn(config, world) for config in configs]

    answers = together(count, action, folder)
    sharing = count // configs[0].parallel.replicate
    for number, config in enumerate(configs):
        name = f"{config.model.layer_pattern} {config.model.attention_variant}"
        with float64():
            alone = learn(replace(config, parallel=ParallelConfig()))
        assert alone["seen"][0][2] > CLIP, "clipping is a part of it"
        assert abs(alone["seen"][0][0] - alone["seen"][-1][0]) > 0.01, "something was learned"
        for rank, answer in enumerate(answers):
            close = {"rtol": 1e-9, "atol": 1e-9}
            torch.testing.assert_close(
                torch.tensor(answer[number]["seen"]),
                torch.tensor(alone["seen"]),
                **close,
                msg=lambda text, who=f"{name}, process {rank}": f"{who}: {text}",
            )
        covered = 0
        for path, ((_, whole),) in alone["weights"].items():
            filled = torch.full_like(whole, float("nan"))
            for answer in answers:
                for place, values in answer[number]["weights"][path]:
                    known = filled[place]
                    alike = known.isnan() | (known == values)
                    assert bool(alike.all()), f"{name} {path}: copies differ"
                    filled[place] = values
            torch.testing.assert_close(filled, whole, rtol=1e-8, atol=1e-8, msg=f"{name} {path}")
            covered += whole.numel()
        for answer in answers:
            parts = [part for parts in answer[number]["weights"].values() for part in parts]
            mine = sum(values.numel() for _, values in parts)
            assert mine < 1.2 * covered / sharing, "each process holds its share"


@pytest.fixture
def exact(make: MakeConfig) -> MakeConfig:
    """Configurations whose model has every kind of parameter, for `check_equal`."""

    def exactly(name: str, tensor: int = 2, **fields: Any) -> RunConfig:
        model: dict[str, Any] = {"attention_bias": True, **fields.pop("model", {})}
        config = make(name, parallel=ParallelConfig(tensor=tensor), **fields)
        optimizer = replace(config.optimizer, clip_norm=CLIP)
        return replace(config, model=tiny_config(name, **model), optimizer=optimizer)

    return exactly


def test_two_processes_compute_each_kind_of_layer(exact: MakeConfig, tmp_path: Path) -> None:
    """All mixers, and memories of all three sources; the other models are among the slow tests."""
    names = ["sambay+da", "sambay-a", "sambay-mlp"]
    check_equal([exact(name) for name in names], 2, tmp_path)


@pytest.mark.slow
def test_shards_of_parts(exact: MakeConfig, tmp_path: Path) -> None:
    """FSDP2 x tensor: rows that do not divide, micro-batches, an untied head, another loss."""
    config = exact(
        "sambay+da",
        model={"tie_embeddings": False, "intermediate_size": 50},
        batch=BatchConfig(BATCH, 2),
        regularisation=RegularisationConfig(label_smoothing=0.1, z_loss=1e-3),
    )
    check_equal([config], 4, tmp_path)


@pytest.mark.slow
def test_shards_of_parts_of_each_model(exact: MakeConfig, tmp_path: Path) -> None:
    check_equal([exact(name) for name in NAMES], 4, tmp_path)


@pytest.mark.slow
def test_four_in_a_group(exact: MakeConfig, tmp_path: Path) -> None:
    """One pair of heads each, and fewer classes for the last."""
    heads = {"num_heads": 8, "num_kv_heads": 8}
    configs = [exact(name, 4, model=heads) for name in ("sambay", "sambay+da")]
    configs.append(exact("sambay-mlp", 4, model={"vocab_size": 7}))
    check_equal(configs, 4, tmp_path)


@pytest.mark.slow
def test_replicas_of_parts(exact: MakeConfig, tmp_path: Path) -> None:
    config = exact("sambay")
    config = replace(config, parallel=ParallelConfig(replicate=2, tensor=2))
    check_equal([config], 4, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_parts(recompute: str, exact: MakeConfig, tmp_path: Path) -> None:
    config = exact("sambay+da", activation_checkpointing=ActivationCheckpointing(recompute))
    check_equal([config], 2, tmp_path)


TENSOR_2 = ParallelConfig(tensor=2)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, TENSOR_2), (1, ParallelConfig())),
        pytest.param((1, ParallelConfig()), (2, TENSOR_2), marks=pytest.mark.slow),
        pytest.param((4, TENSOR_2), (2, ParallelConfig()), marks=pytest.mark.slow),
        pytest.param((2, ParallelConfig()), (4, TENSOR_2), marks=pytest.mark.slow),
    ],
    ids=["leaves", "joins", "leaves-shards", "joins-shards"],
)
def test_another_layout_continues(
    before: tuple[int, ParallelConfig],
    after: tuple[int, ParallelConfig],
    make: MakeConfig,
    tmp_path: Path,
) -> None:
    config = make("sambay+da", steps=4)
    run(before[0], replace(config, parallel=before[1]), tmp_path / "run", display=StopAt(2))
    assert CheckpointStore(tmp_path / "run", config.checkpoint).steps() == [2]
    changed = run(after[0], replace(config, parallel=after[1]), tmp_path / "run")
    assert_close(changed, run(1, config, tmp_path / "whole"))
    models = [load_model_folder(tmp_path / name / "model") for name in ("run", "whole")]
    first, second = (dict(model.named_parameters()) for model in models)
    assert first.keys() == second.keys()
    for name, parameter in first.items():
        assert torch.allclose(parameter, second[name], atol=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_runs_of_parts(name: str, count: int, make: MakeConfig, tmp_path: Path) -> None:
    """Whole runs in float32; a rate at which rounding does not grow beyond what is allowed."""
    config = make(name, steps=30)
    config = replace(config, optimizer=replace(config.optimizer, peak_learning_rate=1e-3))
    split = run(count, replace(config, parallel=TENSOR_2), tmp_path / "split")
    assert_close(split, run(1, config, tmp_path / "alone"))
    assert split[0]["loss"] - split[-1]["loss"] > 1


@pytest.mark.slow
def test_parts_resume_bit_for_bit(make: MakeConfig, tmp_path: Path) -> None:
    config = make(steps=5, parallel=TENSOR_2)
    run(4, config, tmp_path / "whole")
    run(4, config, tmp_path / "cut", display=StopAt(2))
    run(4, config, tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_parts_of_compiled_blocks(
    make: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and differentiated by the compiler, but run by torch: that takes seconds."""
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: plain(self, backend="aot_eager"))
    config = make("sambay+da", steps=2)
    split = replace(config, parallel=TENSOR_2, compile=True)
    assert_close(run(2, split, tmp_path / "split"), run(1, config, tmp_path / "alone"))


@pytest.mark.slow
def test_parts_in_bfloat16(make: MakeConfig, tmp_path: Path) -> None:
    """Partial sums are rounded before they are added, so only nearly the same."""
    config = make("sambay+da", steps=3, precision=Precision.BF16)
    split = run(4, replace(config, parallel=TENSOR_2), tmp_path / "split")
    alone = run(1, config, tmp_path / "alone")
    for one, other in zip(split, alone, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-2)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=3e-2)


def test_processes_start_with_the_weights_of_one(make: MakeConfig, tmp_path: Path) -> None:
    config = make("sambay+da", parallel=TENSOR_2)
    wanted = dict(Trainer(make("sambay+da")).model.named_parameters())

    def mine() -> int:
        with joined(config) as world:
            model = Trainer(config, world).model
            halved = halved_parameters(model)
            held = 0
            for name, parameter in model.named_parameters():
                for part in pieces_of(parameter, in_halves=name in halved).parts:
                    assert torch.equal(part.values, wanted[name].detach()[part.place]), name
                    held += part.values.numel()
            return held

    repeated = sum(p.numel() for p in wanted.values() if p.dim() == 1)  # at the most
    size = sum(p.numel() for p in wanted.values())
    assert all(size / 2 <= held <= size / 2 + repeated for held in together(2, mine, tmp_path))


class Messages(TorchDispatchMode):
    """How many sums of which size the layers ask for; the loss and the gradient norm ask others."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        namespace, _, name = str(function).partition(".")
        if namespace == "_c10d_functional" and name.startswith(("all", "reduce", "broad")):
            self.seen[name, args[0].numel()] += 1
        return function(*args, **(kwargs or {}))


def test_no_more_is_sent_than_must_be(make: MakeConfig, tmp_path: Path) -> None:
    """One sum behind each mixer and MLP, one before it on the way back; small ones in Mamba."""
    config = make("sambay", parallel=TENSOR_2)
    model = config.model

    def action() -> Counter[tuple[str, int]]:
        with joined(config) as world, Messages() as messages:
            Trainer(config, world).gradients(random_batch(config, 0), 0)
            return messages.seen

    tokens = BATCH * SEQUENCE
    num_mamba = sum(layer.kind is LayerKind.MAMBA for layer in model.layers)
    wanted = {
        ("all_reduce.default", tokens * model.hidden_size): 4 * model.num_layers + 1,
        ("all_reduce.default", tokens * (model.dt_rank + 2 * model.d_state)): 2 * num_mamba,
    }
    assert together(2, action, tmp_path) == [wanted, wanted]


def test_a_vocabulary_too_small_for_all_is_refused(exact: MakeConfig) -> None:
    sizes_for(exact("sambay", 4, model={"vocab_size": 7}), 4)
    with pytest.raises(ConfigError, match="vocab_size: 6 classes leave none for the last"):
        sizes_for(exact("sambay", 4, model={"vocab_size": 6}), 4)
