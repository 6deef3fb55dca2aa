"""The memory estimate against the tensors autograd really keeps, and against itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sambay.model import LanguageModel
from sambay.recipes.flash import phi4_mini_flash
from sambay.recipes.published import ladder
from sambay.spec.footprint import parameter_count
from sambay.train.config import (
    ActivationCheckpointing,
    BatchConfig,
    DataConfig,
    OptimizerConfig,
    Precision,
    RunConfig,
    ScheduleConfig,
)
from sambay.train.cost import (
    Layout,
    kept_by,
    memory_estimate,
    products_of,
    training_seconds,
)
from tests.tiny import tiny_config

ROWS, LENGTH = 2, 256
# Where the layer stands that is measured: behind these, and last of the second.
BEHIND = {"M": ("M", "MM"), "S": ("S", "SS"), "F": ("F", "FF"), "C": ("FC", "FCC"),
          "G": ("MG", "MGG")}  # fmt: skip


def run_config(pattern: str, length: int, precision: Precision, **fields: object) -> RunConfig:
    model = tiny_config(
        "sambay", layer_pattern=pattern, window=64, residual_multiplier=1.0, logit_multiplier=1.0,
        **fields,
    )  # fmt: skip
    return RunConfig(
        model=model,
        data=DataConfig("nowhere", length),
        optimizer=OptimizerConfig(1e-3),
        schedule=ScheduleConfig(ROWS * length),
        batch=BatchConfig(ROWS, ROWS),
        precision=precision,
    )


def kept_bytes(config: RunConfig) -> int:
    """The bytes of all tensors a forward pass keeps for its backward, parameters left out."""
    model = LanguageModel(config.model).train()
    model.recompute = config.activation_checkpointing.value
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros(ROWS, config.data.sequence_length, dtype=torch.int64)
    is_bf16 = config.precision is Precision.BF16
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=is_bf16),
    ):
        model.hidden_states(ids)
    return sum(storage.nbytes() for storage in kept.values())


def kept_per_token(pattern: str, precision: Precision, **fields: object) -> float:
    """The slope in the number of tokens, so that copies of weights drop out."""
    short, long = (
        kept_bytes(run_config(pattern, length, precision, **fields))
        for length in (LENGTH, 2 * LENGTH)
    )
    return (long - short) / ROWS / LENGTH


VARIANTS = [
    *((kind, {}) for kind in BEHIND),
    *((kind, {"attention_variant": "differential"}) for kind in "SFC"),
    *((kind, {"position": "rope"}) for kind in "SFC"),
    *((kind, {"norm": "layer"}) for kind in BEHIND),
    *(("M", {"recurrent_kind": kind}) for kind in ("mamba2", "gated_delta")),
    ("G", {"gated_memory": "normalised"}),
]


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize(("kind", "fields"), VARIANTS, ids=str)
def test_what_a_layer_keeps(kind: str, fields: dict[str, str], precision: Precision) -> None:
    with_one, with_two = (kept_per_token(one, precision, **fields) for one in BEHIND[kind])
    config = run_config(BEHIND[kind][1], LENGTH, precision, **fields)
    expected = sum(kept_by(config, config.model.layers[-1]))
    # Sums and means of norms, a few numbers per token, are not counted.
    assert expected == pytest.approx(with_two - with_one, rel=0.03)


def flash(**fields: object) -> RunConfig:
    return replace(phi4_mini_flash(), **fields)


def test_one_process_holds_everything() -> None:
    config = flash()
    estimate = memory_estimate(config)
    parameters = parameter_count(config.model)
    assert estimate.gradients == 4 * parameters
    assert estimate.optimizer == 8 * parameters
    # Blocks run twice, so only one has its bfloat16 copies at a time.
    assert 4 * parameters < estimate.weights < 4.1 * parameters
    whole = memory_estimate(config, recompute=ActivationCheckpointing.NONE)
    in_blocks = whole.weights - 4 * parameters
    assert 0.98 < in_blocks / (2 * (parameters - 512_163_840)) < 1
    assert memory_estimate(replace(config, precision=Precision.FP32)).weights == 4 * parameters


def test_shards_divide_the_state_and_replicas_do_not() -> None:
    config = flash()
    one, eight = memory_estimate(config), memory_estimate(config, Layout(1, 8, 1))
    assert 8 * eight.optimizer == pytest.approx(one.optimizer, rel=1e-6)
    assert eight.gathered > config.model.vocab_size * config.model.hidden_size * 4
    assert memory_estimate(config, Layout(16, 8, 1)) == eight
    copies = memory_estimate(config, Layout(8, 1, 1))  # each whole, and gathered all the same
    assert copies.optimizer == one.optimizer
    assert copies.gathered == eight.gathered
    split = memory_estimate(config, Layout(1, 8, 2))
    assert 2 * split.optimizer == pytest.approx(eight.optimizer, rel=1e-6)
    assert eight.activations / 2 < split.activations < eight.activations
    assert split.loss < eight.loss


@pytest.mark.parametrize("config", [ladder("sambay", 8), ladder("transformer++", 24), flash()])
def test_more_is_computed_again_less_is_kept(config: RunConfig) -> None:
    none, selective, full = (
        memory_estimate(config, recompute=mode).activations for mode in ActivationCheckpointing
    )
    assert none > 1.5 * selective > 1.5 * full
    for layer in config.model.layers:
        assert sum(products_of(config, layer)) < sum(kept_by(config, layer))


def test_rows_that_a_process_does_not_have_need_no_memory() -> None:
    config = ladder("sambay", 8)  # 512 rows, 4 at a time
    few = memory_estimate(config, Layout(1, 512, 1))
    assert 4 * few.activations == memory_estimate(config, Layout(1, 64, 1)).activations


def test_separate_documents_keep_masks() -> None:
    """Only attention without a window pays, by the square of the length."""
    plain = ladder("transformer++", 8)
    apart = replace(plain, data=replace(plain.data, separate_documents=True))
    difference = [
        kept_by(apart, layer).inner - kept_by(plain, layer).inner for layer in plain.model.layers
    ]
    assert difference == [2 * (4097 // 2) + 2 * plain.model.attention_size] * 8


def test_time_of_the_published_run() -> None:
    """14 days on 1,024 GPUs (arXiv 2507.06607, section 3.3) are a third of their peak."""
    seconds = training_seconds(flash(), 1024, 312e12)
    assert 0.30 < seconds / (14 * 86_400) < 0.34
    assert training_seconds(flash(), 2, 1e12) == 512 * training_seconds(flash(), 1024, 1e12)
