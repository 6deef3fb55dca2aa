"""The recipes of the published runs, at full size on the meta device, and two small steps each.

Numbers from arXiv 2507.06607: section 3, tables 1, 2, 6, 7, appendix D.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sambay.data.manifest import Manifest
from sambay.errors import ConfigError
from sambay.model import LanguageModel
from sambay.recipes.flash import phi4_mini_flash
from sambay.recipes.long_context import prolong_32k
from sambay.recipes.published import data_scaling, ladder
from sambay.scaling.horizon import Horizon
from sambay.spec import InitScheme, Parametrization, presets
from sambay.train.config import (
    BatchConfig,
    RunConfig,
)
from sambay.train.loop import train
from sambay.train.metrics import read_metrics
from tests.train.conftest import make_data

# Table 7 and the rules of table 6: depth -> rate, and rate of matrices.
RATES = {8: (5.66e-4, 1.131e-3), 12: (4.62e-4, 6.16e-4), 16: (4e-4, 4e-4), 20: (3.58e-4, 2.86e-4),
         24: (3.27e-4, 2.18e-4)}  # fmt: skip
# Table 7: billions of tokens at these depths.
TOKENS = {
    "transformer++": (12.5, 42.2, 100.0, 195.3, 337.5),
    "sambay": (12.7, 42.8, 101.4, 198.0, 342.1),
    "samba+yoco": (12.7, 42.7, 101.2, 197.8, 341.7),
}
# Exact counts of the released layer order in millions (no published ones: table 7 has formulas).
MILLIONS = {
    "transformer++": (154.42, 459.71, 1038.68, 1982.57, 3382.59),
    "sambay": (158.60, 472.21, 1065.82, 2032.26, 3464.38),
    "samba+yoco": (161.07, 477.26, 1074.19, 2044.66, 3481.32),
}
# Tables 1 and 2: the window of each long-context model.
WINDOWS = {
    "transformer++": None, "transformer-ls": 256, "swa+yoco": 128, "samba+yoco": 1024,
    "sambay": 256, "sambay+da": 512,
}  # fmt: skip
ROPE = {"transformer++", "transformer-ls", "swa+yoco"}


def meta_parameters(config: RunConfig) -> int:
    with torch.device("meta"):
        model = LanguageModel(config.model)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("architecture", TOKENS)
@pytest.mark.parametrize("rung", range(5))
def test_the_ladder_at_full_size(architecture: str, rung: int) -> None:
    depth = list(RATES)[rung]
    config = ladder(architecture, depth)
    rate, matrix_rate = RATES[depth]
    optimizer = config.optimizer
    assert meta_parameters(config) / 1e6 == pytest.approx(MILLIONS[architecture][rung], abs=5e-3)
    assert config.schedule.total_tokens / 1e9 == pytest.approx(
        TOKENS[architecture][rung], abs=0.051
    )
    assert optimizer.peak_learning_rate == pytest.approx(rate, rel=2e-3)
    matrices = optimizer.peak_learning_rate * optimizer.matrix_learning_rate_factor
    assert matrices == pytest.approx(matrix_rate, rel=2e-3)
    assert (optimizer.weight_decay, optimizer.vector_weight_decay) == (0.1, 0.0)
    assert config.tokens_per_step == 2**21
    assert config.model.residual_multiplier == pytest.approx((2 * depth) ** -0.5)
    assert config.model.logit_multiplier == 16 / depth


@pytest.mark.parametrize("architecture", presets.NAMES)
def test_every_architecture_has_a_ladder(architecture: str) -> None:
    config = ladder(architecture, 8)
    assert meta_parameters(config) > 1e8
    assert 12e9 < config.schedule.total_tokens < 13.5e9
    assert config.model == presets.build(architecture, 8)


def test_depths_that_an_architecture_cannot_have() -> None:
    for depth in (12, 20):
        with pytest.raises(ConfigError, match="differential attention pairs heads"):
            ladder("sambay+da", depth)


@pytest.mark.parametrize("tokens", [100_000_000_000, 600_000_000_000])
def test_data_scaling(tokens: int) -> None:
    config = data_scaling("transformer++", tokens)
    assert config.schedule.total_tokens == tokens
    same = replace(config, schedule=replace(config.schedule, total_tokens=100_000_000_000))
    assert same == ladder("transformer++", 16)


def test_data_scaling_with_a_horizon() -> None:
    """Batches are whole micro-batches of rows; the third root of 8 halves the rate."""
    grown = data_scaling("sambay", 200_000_000_000, horizon=Horizon.BATCH)
    assert grown.batch == BatchConfig(724, 4)
    assert grown.optimizer.peak_learning_rate == pytest.approx(4e-4 * (724 / 512) ** 0.5)
    slow = data_scaling("sambay", 800_000_000_000, horizon=Horizon.RATE)
    assert slow.batch == BatchConfig(512, 4)
    assert slow.optimizer.peak_learning_rate == pytest.approx(2e-4)
    assert slow.optimizer.weight_decay == pytest.approx(0.2)
    assert slow.optimizer.vector_weight_decay == 0


def test_the_baselines_in_other_parametrizations() -> None:
    """Table 6: SP and plain muP decay everything; SP knows no multipliers."""
    for parametrization, factor, logits, scheme in (
        (Parametrization.STANDARD, 1, 1, InitScheme.STANDARD),
        (Parametrization.MUP, 2, 2, InitScheme.MUP_RELEASED),
    ):
        config = ladder("transformer++", 8, parametrization)
        optimizer = config.optimizer
        assert (optimizer.peak_learning_rate, optimizer.matrix_learning_rate_factor) == (
            4e-4,
            factor,
        )
        assert optimizer.vector_weight_decay == optimizer.weight_decay == 0.1
        assert (config.model.residual_multiplier, config.model.logit_multiplier) == (1, logits)
        assert config.init_scheme is scheme


@pytest.mark.parametrize("architecture", WINDOWS)
def test_long_context(architecture: str) -> None:
    config = prolong_32k(architecture)
    assert meta_parameters(config) > 1.03e9
    assert config.model.window == WINDOWS[architecture]
    assert config.model.position == ("rope" if architecture in ROPE else "none")
    if architecture in ROPE:
        assert config.model.rope_theta == 640_000
    assert (config.data.sequence_length, config.data.separate_documents) == (32_768, True)
    assert config.batch.global_batch_size == 64
    assert config.tokens_per_step == 2**21
    assert config.schedule.total_tokens == 40e9
    assert config.schedule.warmup_tokens == 1e9
    assert config.optimizer.peak_learning_rate == 4e-4


def test_phi4_mini_flash() -> None:
    config = phi4_mini_flash()
    assert meta_parameters(config) == 3_852_562_944
    assert config.tokens_per_step == 8_388_608
    assert config.num_steps == 596_046
    assert config.schedule.total_tokens == 5 * 10**12
    assert config.schedule.warmup_tokens == 3000 * 8_388_608
    assert config.optimizer.peak_learning_rate == 5e-4
    assert config.optimizer.weight_decay == config.optimizer.vector_weight_decay == 0.1
    assert config.model.residual_multiplier == config.model.logit_multiplier == 1
    assert config.init_scheme is InitScheme.STANDARD
    noise = config.regularisation
    assert noise.label_smoothing == 0.1
    assert noise.dropout_at(309_999) == (0, 0)
    assert noise.dropout_at(310_000) == (0.05, 0)
    assert noise.dropout_at(520_000) == (0.05, 0.05)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("prepared"))


def miniature(config: RunConfig, data: Path) -> RunConfig:
    """The same pattern, loss, precision and kind of schedule in a tiny model: two steps."""
    model = config.model.replace(
        vocab_size=Manifest.read(data).vocab_size, hidden_size=24, intermediate_size=32,
        num_heads=4, num_kv_heads=2, head_dim=8, attention_scale=8**-0.5,
        window=None if config.model.window is None else 5,
    )  # fmt: skip
    regularisation = config.regularisation
    if regularisation.attention_dropout:  # begins at the first and second step
        regularisation = replace(
            regularisation, self_decoder_from_step=0, cross_decoder_from_step=1
        )
    return replace(
        config,
        model=model,
        data=config.data.replace(directory=str(data), sequence_length=16),
        schedule=replace(config.schedule, total_tokens=128, warmup_tokens=32),
        batch=BatchConfig(4, 2),
        regularisation=regularisation,
        evaluation=replace(config.evaluation, every_steps=2, max_tokens=64, lengths=(1, 2)),
        threads=1,
    )


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(ladder("sambay", 8), marks=pytest.mark.slow, id="ladder"),
        pytest.param(ladder("transformer++", 8, Parametrization.STANDARD), id="standard"),
        pytest.param(data_scaling("samba+yoco"), marks=pytest.mark.slow, id="data"),
        pytest.param(prolong_32k("transformer-ls"), marks=pytest.mark.slow, id="rope"),
        pytest.param(prolong_32k("sambay+da"), id="differential"),
        pytest.param(phi4_mini_flash(), id="flash"),
    ],
)
def test_two_steps_in_miniature(config: RunConfig, data: Path, tmp_path: Path) -> None:
    small = miniature(config, data)
    outcome = train(small, tmp_path)
    assert outcome.progress.step == 2
    first, second = read_metrics(tmp_path)
    # Read off in the middle of a step of 64 tokens: at the end of the warm-up, and half-way down.
    peak = config.optimizer.peak_learning_rate
    assert first["learning_rate"] == pytest.approx(peak)
    assert second["learning_rate"] == pytest.approx(peak * (128 - 96) / (128 - 32))
    assert 3 < second["loss"] < 7
    smoothed = config.regularisation.label_smoothing > 0
    assert (second.get("objective", second["loss"]) != second["loss"]) == smoothed
