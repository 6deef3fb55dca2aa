"""Every recipe builds at full size without memory, and a miniature of it trains two steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sambay.data.manifest import Manifest
from sambay.errors import ConfigError
from sambay.model import LanguageModel
from sambay.recipes.catalogue import RECIPES, find_recipe
from sambay.spec.footprint import parameter_count
from sambay.train.config import BatchConfig, DataConfig, EvaluationConfig, RunConfig, ScheduleConfig
from sambay.train.loop import train
from sambay.train.plan import describe
from tests.train.conftest import make_data

PARAMETERS = {
    "demo_sambay": 6_126_200,
    "demo_transformer": 6_073_808,
    "sambay_20m": 21_084_288,
    "transformer_20m": 21_101_200,
    "small_ladder": 41_200,
    "sambay_1b": 1_065_818_688,
    "transformer_1b": 1_038_682_112,
    "ladder": 1_065_818_688,
    "data_scaling": 1_065_818_688,
    "prolong_32k": 1_065_818_688,
    "phi4_mini_flash": 3_852_562_944,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("prepared"))


def test_the_list_is_complete() -> None:
    assert set(RECIPES) == set(PARAMETERS)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_builds_on_the_meta_device(name: str) -> None:
    config = RECIPES[name]()
    with torch.device("meta"):
        model = LanguageModel(config.model)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == parameter_count(config.model) == PARAMETERS[name]
    assert dict(describe(config))["parameters"].startswith(f"{count:,} ")


# The others are in test_published.py, with their loss, noise and precision.
@pytest.mark.parametrize(
    "name", sorted(set(RECIPES) - {"ladder", "data_scaling", "prolong_32k", "phi4_mini_flash"})
)
def test_a_miniature_runs_two_steps(name: str, data: Path, tmp_path: Path) -> None:
    config = RECIPES[name]()
    vocab_size = Manifest.read(data).vocab_size
    small = config.model.replace(
        vocab_size=vocab_size, hidden_size=24, intermediate_size=32, num_heads=4, num_kv_heads=2
    )
    miniature = replace(
        config,
        model=small,
        data=DataConfig(str(data), sequence_length=16),
        schedule=ScheduleConfig(2 * 64, warmup_tokens=64, kind=config.schedule.kind),
        batch=BatchConfig(4, 2),
        evaluation=EvaluationConfig(2, 64),
        threads=1,
    )
    outcome = train(miniature, tmp_path)
    assert outcome.progress.step == 2
    assert outcome.evaluation is not None
    assert 3 < outcome.evaluation.loss < 7


@pytest.mark.parametrize(
    "pair", [("demo_sambay", "demo_transformer"), ("sambay_20m", "transformer_20m")]
)
def test_pairs_differ_in_nothing_but_the_model(pair: tuple[str, str]) -> None:
    first, second = (RECIPES[name]() for name in pair)
    assert replace(first, model=second.model) == second
    counts = [parameter_count(config.model) for config in (first, second)]
    assert max(counts) < 1.02 * min(counts)


def test_published_hyperparameters() -> None:
    """arXiv 2507.06607, section 3.1 and table 7."""
    config = RECIPES["sambay_1b"]()
    assert config.model.layer_pattern == "4x(M S) M F 3x(G C)"
    assert config.tokens_per_step == 2**21
    assert (config.optimizer.peak_learning_rate, config.optimizer.weight_decay) == (4e-4, 0.1)
    assert (config.optimizer.beta1, config.optimizer.beta2, config.optimizer.eps) == (
        0.9,
        0.95,
        1e-8,
    )
    schedule = config.schedule
    assert schedule.warmup_tokens == 10**9
    assert schedule.total_tokens == pytest.approx(101.4e9, abs=5e7)
    assert schedule.minimum_factor == 0


def test_a_recipe_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import replace\n"
        "from sambay.recipes.demo import demo_sambay\n"
        "def shifted():\n    return replace(demo_sambay(), seed=42)\n"
        "def wrong():\n    return 3\n"
        "value = 3\n"
    )
    name, config = find_recipe(f"{file}:shifted")
    assert (name, config.seed) == ("shifted", 42)
    for text, message in (
        (f"{file}:shiftd", "did you mean 'shifted'"),
        (f"{file}:value", "no function 'value'"),
        (f"{file}:wrong", "returns int"),
        (f"{file}", "names no function"),
        (f"{tmp_path}/other.py:f", "does not exist"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_recipe(text)
    file.write_text("def broken(:")
    with pytest.raises(ConfigError, match="cannot be imported"):
        find_recipe(f"{file}:broken")


def test_a_recipe_from_an_earlier_run(tmp_path: Path) -> None:
    from sambay.files import write_json

    config: RunConfig = replace(RECIPES["demo_sambay"](), seed=3)
    write_json(tmp_path / "first" / "config.json", config.to_dict())
    for text in (tmp_path / "first" / "config.json", tmp_path / "first"):
        assert find_recipe(str(text)) == ("first", config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("demo_samby", "did you mean 'demo_sambay'"),
        ("zzz", "known: data_scaling, demo_sambay"),
        ("nowhere/config.json", "does not exist"),
    ],
)
def test_unknown_recipes(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_recipe(text)
