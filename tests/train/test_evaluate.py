"""Measuring on several sets and lengths; and the sets a run refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sambay.cli.overrides import apply_overrides
from sambay.data.batches import IGNORE, Batch
from sambay.data.manifest import MANIFEST_FILE, Manifest
from sambay.data.prepare import prepare
from sambay.data.settings import PrepareSettings
from sambay.errors import CheckpointMismatch, ConfigError, DataError
from sambay.recipes.demo import demo_sambay
from sambay.train.config import (
    BatchConfig,
    DataConfig,
    EvaluationConfig,
    MixtureSource,
    Packing,
    RunConfig,
)
from sambay.train.data_checks import check_data, describe_data
from sambay.train.evaluate import evaluate, evaluate_all
from sambay.train.loop import train
from sambay.train.metrics import read_metrics
from sambay.train.sources import open_batches, open_validation
from sambay.train.trainer import Trainer
from tests.train.conftest import GLOBAL_BATCH, SEQUENCE, make_data

MakeConfig = Callable[..., RunConfig]


def write_set(folder: Path, tokenizer: Path, word: str, *, held_out: float = 0.3) -> Path:
    """A set of the same tokenizer, of documents of very unequal lengths."""
    (folder / "texts").mkdir(parents=True)
    for number in range(20):
        (folder / "texts" / f"{number}.txt").write_text(f"{number} " + f"{word} " * (number * 7))
    rules = PrepareSettings(tokenizer=str(tokenizer), validation_fraction=held_out)
    prepare([folder / "texts"], folder / word, rules, workers=1)
    return folder / word


@pytest.fixture(scope="module")
def others(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("others")
    return write_set(folder / "a", data, "omega"), write_set(folder / "b", data, "psi")


def mixed(config: RunConfig, folders: list[Path], weights: list[float], **fields: Any) -> RunConfig:
    sources = tuple(
        MixtureSource(str(folder), weight) for folder, weight in zip(folders, weights, strict=True)
    )
    return replace(config, data=config.data.replace(mixture=sources, **fields))


def counting_loss(seen: list[tuple[int, ...]]) -> Callable[[Batch], torch.Tensor]:
    """A loss of one nat per label that counts, which notes the shapes it is given."""

    def loss(batch: Batch) -> torch.Tensor:
        seen.append(tuple(batch.input_ids.shape))
        return (batch.labels != IGNORE).sum().double()

    return loss


def test_every_set_and_length_is_measured_and_logged(
    make_config: MakeConfig, data: Path, others: tuple[Path, Path], tmp_path: Path
) -> None:
    config = make_config(steps=4)
    sets = {"home": str(data), "omega": str(others[0])}
    config = replace(config, evaluation=EvaluationConfig(2, None, sets, (1, 2, 4)))
    outcome = train(config, tmp_path)
    lines = {line["step"]: line for line in read_metrics(tmp_path)}
    names = [f"{name}/{SEQUENCE * n}" for name in sets for n in (1, 2, 4)]
    keys = {f"validation/{name}/{what}" for name in names for what in ("loss", "bits_per_byte")}
    assert {key for key in lines[4] if key.startswith("validation/")} == keys
    assert not any(key.startswith("validation") for key in lines[3])
    assert lines[2].keys() == lines[4].keys()
    first = [lines[4][f"validation/{name}/{SEQUENCE}/loss"] for name in sets]
    assert lines[4]["validation_loss"] == pytest.approx(sum(first) / 2)
    assert outcome.evaluation is not None
    assert outcome.evaluation.loss == lines[4]["validation_loss"]
    # Longer rows give more context to the same tokens.
    counts = {name: part.tokens for name, part in outcome.evaluation.parts.items()}
    for name in sets:
        assert len({counts[f"{name}/{SEQUENCE * n}"] for n in (1, 2, 4)}) == 1
        assert len({lines[4][f"validation/{name}/{SEQUENCE * n}/loss"] for n in (1, 2, 4)}) == 3


@pytest.mark.parametrize("separate", [False, True])
def test_memory_does_not_grow_with_the_length(
    make_config: MakeConfig, separate: bool, others: tuple[Path, Path]
) -> None:
    config = make_config(batch=BatchConfig(12, 12), evaluation=EvaluationConfig(9, 280))
    config = replace(config, data=config.data.replace(separate_documents=separate))
    (one,) = open_validation(config, open_batches(config))
    for multiple in (1, 2, 3, 4, 20):
        seen: list[tuple[int, ...]] = []
        found = evaluate(counting_loss(seen), one.dataset, config, multiple=multiple)
        assert max(rows * columns for rows, columns in seen) <= max(12, multiple) * SEQUENCE
        assert max(columns for _, columns in seen) == multiple * SEQUENCE
        assert sum(rows * columns for rows, columns in seen) <= 280
        assert found.loss == pytest.approx(1.0)
        assert found.bits_per_byte == pytest.approx(found.tokens / math.log(2) / found.text_bytes)
        again: list[tuple[int, ...]] = []
        assert evaluate(counting_loss(again), one.dataset, config, multiple=multiple) == found
        assert again == seen


def test_a_mixture_is_measured_by_its_weights(
    make_config: MakeConfig, data: Path, others: tuple[Path, Path], tmp_path: Path
) -> None:
    config = mixed(make_config(steps=4), [data, *others], [0.5, 0.2, 0.3])
    outcome = train(config, tmp_path)
    lines = read_metrics(tmp_path)
    last = lines[-1]
    expected = sum(
        weight * last[f"validation/{name}/{SEQUENCE}/loss"]
        for name, weight in (("data", 0.5), ("omega", 0.2), ("psi", 0.3))
    )
    assert last["validation_loss"] == pytest.approx(expected)
    assert outcome.progress.step == 4
    for line in lines:
        rows = {name: line[f"data/{name}/tokens"] / SEQUENCE for name in ("data", "omega", "psi")}
        total = line["step"] * GLOBAL_BATCH
        assert sum(rows.values()) == total
        for name, weight in (("data", 0.5), ("omega", 0.2), ("psi", 0.3)):
            assert abs(rows[name] - total * weight) < 1
            assert line[f"data/{name}/share"] == pytest.approx(rows[name] / total)


def test_a_single_set_is_logged_as_it_always_was(make_config: MakeConfig, tmp_path: Path) -> None:
    train(make_config(steps=4), tmp_path)
    keys = {key for line in read_metrics(tmp_path) for key in line}
    assert {"validation_loss", "validation_bits_per_byte"} <= keys
    assert not any(key.startswith(("data/", "validation/")) for key in keys)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.floats(0.1, 9), st.integers(1, 999), st.integers(1, 999)),
                min_size=2, max_size=5))  # fmt: skip
def test_the_mean_is_that_of_a_text_with_these_shares(
    parts: list[tuple[float, int, int]],
) -> None:
    """Bits per byte of a mean: of the nats and bytes of one token, drawn by the shares."""
    from sambay.train import evaluate as module

    found = [module.Evaluation(loss, 0.0, tokens, size) for loss, tokens, size in parts]
    queue = iter(found)
    sets = [_Named(str(number), 1 / len(parts)) for number in range(len(parts))]
    config = demo_sambay()
    original = module.evaluate
    module.evaluate = lambda *args, **fields: next(queue)  # type: ignore[assignment]
    try:
        mean = evaluate_all(lambda batch: torch.zeros(()), sets, config)  # type: ignore[arg-type]
    finally:
        module.evaluate = original
    nats = sum(part.loss for part in found) / len(found)
    size = sum(part.text_bytes / part.tokens for part in found) / len(found)
    assert mean.loss == pytest.approx(nats)
    assert mean.bits_per_byte == pytest.approx(nats / math.log(2) / size)


class _Named:
    def __init__(self, name: str, weight: float) -> None:
        self.name, self.weight, self.dataset = name, weight, None


def test_a_mixture_goes_on_with_its_own_sets_only(
    make_config: MakeConfig, data: Path, tmp_path: Path
) -> None:
    folder = write_set(tmp_path / "own", data, "omega")
    config = mixed(make_config(steps=4), [data, folder], [0.5, 0.5])
    train(replace(config, schedule=replace(config.schedule)), tmp_path / "run")
    with pytest.raises(CheckpointMismatch, match=r"data\.mixture = \[0\.25, 0\.75\]"):
        train(mixed(config, [data, folder], [0.25, 0.75]), tmp_path / "run")
    with pytest.raises(CheckpointMismatch, match=r"data\.mixture = \[1\.0\]"):
        train(make_config(steps=4), tmp_path / "run")
    # The folder may move, its content may not change.
    folder.rename(tmp_path / "moved")
    moved = mixed(config, [data, tmp_path / "moved"], [0.5, 0.5])
    assert train(moved, tmp_path / "run").progress.step == 4
    changed = write_set(tmp_path / "changed", data, "chi")
    with pytest.raises(CheckpointMismatch, match=r"changed/chi' holds other data"):
        train(mixed(config, [data, changed], [0.5, 0.5]), tmp_path / "run")


def test_whole_documents_are_learned_from(
    make_config: MakeConfig, data: Path, others: tuple[Path, Path], tmp_path: Path
) -> None:
    options = {"separate_documents": True, "packing": Packing.BEST_FIT}
    config = mixed(make_config(steps=3), [data, *others], [0.4, 0.3, 0.3], **options)
    train(config, tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    saved = json.loads((tmp_path / "config.json").read_text())
    assert RunConfig.from_dict(saved) == config


def test_a_mixture_comes_from_a_file_or_the_command_line(tmp_path: Path) -> None:
    mixture = [{"directory": "x/a", "weight": 0.75}, {"directory": "y/a", "weight": 0.25}]
    (tmp_path / "mix.json").write_text(json.dumps(mixture))
    (tmp_path / "sets.json").write_text('{"web": "data/web"}')
    arguments = [f"data.mixture={tmp_path / 'mix.json'}", "evaluation.lengths=1,2,4"]
    config = apply_overrides(
        demo_sambay(), [*arguments, f"evaluation.sets={tmp_path / 'sets.json'}"]
    )
    assert config.data.directory == ""
    assert config.data.mixture == (MixtureSource("x/a", 0.75), MixtureSource("y/a", 0.25))
    assert config.data.source_names == ("x/a", "y/a")
    assert config.evaluation.sets == {"web": "data/web"}
    assert config.evaluation.lengths == (1, 2, 4)
    inline = apply_overrides(demo_sambay(), [f"data.mixture={json.dumps(mixture)}"])
    assert inline.data == config.data
    back = apply_overrides(config, ["data.directory=data"])
    assert back.data == replace(demo_sambay().data, directory="data")
    for text, message in (
        ("data.mixture=nowhere.json", "cannot be read"),
        ('data.mixture=[{"directory": "a"}]', r"'data\.mixture\[0\]\.weight' is missing"),
        ('data.mixture=[{"directory": "a", "wight": 1}]', "did you mean 'weight'"),
        ('data.mixture={"a": 1}', "must be a list"),
        ('data.mixture=["a"]', "must be a group of fields"),
        ("data.mixture=[", "is no JSON"),
        ("evaluation.lengths=1,x", "must be a whole number"),
        ("evaluation.lengths=2,1", "ascending"),
        ("evaluation.lengths=0,1", "whole number >= 1"),
        ('evaluation.sets={"a/b": "c"}', "without '/'"),
        ('evaluation.sets={"a": 3}', "names and texts"),
    ):
        with pytest.raises(ConfigError, match=message):
            apply_overrides(demo_sambay(), [text])


def sources(*pairs: tuple[str, float]) -> dict[str, Any]:
    return {"mixture": tuple(MixtureSource(folder, weight) for folder, weight in pairs)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (sources(("a", 0.5), ("b", 0.4)), "sum to 0.9;"),
        (sources(("a", 0.5), ("./a/", 0.5)), "names a twice"),
        (sources(("a", 1.0), ("b", 0.0)), "a weight of 0;"),
        ({"directory": "a", **sources(("b", 1.0))}, "exactly one of the two"),
        ({}, "exactly one of the two"),
        ({"directory": "a", "packing": Packing.BEST_FIT}, "separate_documents=true"),
    ],
)
def test_data_that_cannot_be_meant_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**fields)


def test_a_negative_weight_names_its_folder() -> None:
    with pytest.raises(ConfigError, match=r"data\.mixture: weight of b = -0\.5"):
        MixtureSource("b", -0.5)


def test_sets_that_do_not_fit_are_refused_by_name(
    make_config: MakeConfig, data: Path, others: tuple[Path, Path], tmp_path: Path
) -> None:
    config = make_config()
    nowhere = tmp_path / "nowhere"
    with pytest.raises(DataError, match=r"nowhere has no manifest\.json"):
        check_data(mixed(config, [data, nowhere], [0.5, 0.5]))
    foreign = make_data(tmp_path / "foreign", seed=9)
    with pytest.raises(ConfigError, match="different tokenizers") as caught:
        check_data(mixed(config, [data, foreign], [0.5, 0.5]))
    assert str(data) in str(caught.value)
    assert str(foreign) in str(caught.value)
    link = tmp_path / "link"
    link.symlink_to(data)
    with pytest.raises(ConfigError, match="link are the same folder"):
        check_data(mixed(config, [data, link], [0.5, 0.5]))
    held_out = write_set(tmp_path / "held", data, "rho", held_out=1.0)
    with pytest.raises(DataError, match=r"training split of .*rho has 0 tokens"):
        check_data(mixed(config, [data, held_out], [0.5, 0.5]))
    manifests = check_data(mixed(config, [data, others[0]], [0.75, 0.25]))
    topic, text = describe_data(mixed(config, [data, others[0]], [0.75, 0.25]), manifests)
    assert topic == "data"
    assert f"0.75 of {data}: " in text
    assert f"0.25 of {others[0]}: " in text


def test_validation_sets_that_do_not_fit_are_refused_by_name(
    make_config: MakeConfig, data: Path, tmp_path: Path
) -> None:
    def check(sets: dict[str, str], lengths: tuple[int, ...] = (1,)) -> None:
        check_data(make_config(evaluation=EvaluationConfig(9, None, sets, lengths)))

    with pytest.raises(DataError, match=r"nowhere has no manifest\.json"):
        check({"x": str(tmp_path / "nowhere")})
    with pytest.raises(ConfigError, match="different tokenizers"):
        check({"x": str(make_data(tmp_path / "foreign", seed=9))})
    none = write_set(tmp_path / "none", data, "tau", held_out=0.0)
    with pytest.raises(DataError, match=r"evaluation\.sets\.x = .* has no validation tokens"):
        check({"x": str(none)})
    with pytest.raises(ConfigError, match=r"evaluation\.lengths has 999 x 13 tokens, but"):
        check({}, (1, 999))
    check({"x": str(write_set(tmp_path / "all", data, "rho", held_out=1.0))}, (1, 2))
    # A training set without held-out documents will do if others are named.
    run = make_config(data=DataConfig(str(none), SEQUENCE))
    with pytest.raises(DataError, match="has no validation tokens"):
        check_data(run)
    check_data(replace(run, evaluation=EvaluationConfig(9, None, {"x": str(data)})))


def test_a_damaged_set_is_named(make_config: MakeConfig, data: Path, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "own", data, "omega")
    config = mixed(make_config(), [data, folder], [0.5, 0.5])
    shard = folder / Manifest.read(folder).splits["train"][0].file
    content = bytearray(shard.read_bytes())
    content[0] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"omega/train/00000\.bin is damaged: its checksum"):
        train(config, tmp_path / "run")
    shard.unlink()
    with pytest.raises(DataError, match=r"omega/train/00000\.bin: No such file"):
        train(config, tmp_path / "run")
    (folder / MANIFEST_FILE).unlink()
    with pytest.raises(DataError, match=r"omega has no manifest\.json"):
        train(config, tmp_path / "run")


def test_a_batch_without_a_label_that_counts_is_no_division_by_zero(
    make_config: MakeConfig,
) -> None:
    ids = torch.zeros(GLOBAL_BATCH, 1, dtype=torch.int64)
    empty = Batch(ids, torch.full_like(ids, IGNORE), torch.zeros_like(ids, dtype=torch.int32))
    trainer = Trainer(make_config())
    learned = trainer.learn(empty, 1e-3, 0)
    assert learned.loss == 0
    assert learned.gradient_norm == 0
