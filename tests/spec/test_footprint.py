"""Published and hand-derived sizes, against modules built on the meta device."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sambay.model import LanguageModel, ModelCache
from sambay.spec import ModelConfig, footprint, presets
from tests.tiny import FAMILY, random_ids, tiny_config, tiny_model

# Exact counts of the released layer pattern at depth 16, tied embeddings counted once, in millions.
MILLIONS_AT_16 = {
    "transformer++": (973.15, 1038.68),
    "transformer-ls": (973.15, 1038.68),
    "samba+yoco": (1009.68, 1074.19),
    "swa+yoco": (988.35, 1054.91),
    "sambay+da": (1002.34, 1065.82),
    "mambay": (994.77, 1056.21),
    "sambay-a": (1009.68, 1074.19),
    "sambay-aa": (1009.68, 1074.19),
    "sambay-mlp": (985.33, 1046.77),
    "sambay-2": (1004.97, 1068.46),
    "mambay-2": (1006.57, 1068.01),
    "gdny": (989.47, 1050.91),
    "s-gdny": (1018.08, 1082.59),
}
PATTERNS_AT_16 = {
    "transformer++": "16xF",
    "transformer-ls": "4x(S S S F)",
    "samba": "8x(M S)",
    "swa+yoco": "9xS F 6xC",
    "samba+yoco": "4x(M S) M F 6xC",
    "sambay": "4x(M S) M F 3x(G C)",
    "sambay+da": "4x(M S) M F 3x(G C)",
    "mambay": "9xM F 3x(G C)",
    "sambay-a": "4x(M S) M F 3x(G C)",
    "sambay-aa": "4x(M S) M F 6xG",
    "sambay-mlp": "4x(M S) M F 3x(G C)",
    "sambay-2": "4x(M S) M F 3x(G C)",
    "mambay-2": "9xM F 3x(G C)",
    "gdny": "9xM F 3x(G C)",
    "s-gdny": "4x(M S) M F 3x(G C)",
    "sambay-2+nb": "4x(M S) M F 3x(G C)",
    "mambay-2+nb": "9xM F 3x(G C)",
    "s-gdny+gdn": "4x(M S) M F 3x(G C)",
    "gdny+gdn": "9xM F 3x(G C)",
}


def count(config: ModelConfig) -> int:
    with torch.device("meta"):
        model = LanguageModel(config)
    return sum(parameter.numel() for parameter in model.parameters())


def in_millions(config: ModelConfig, *, embeddings: bool = True) -> float:
    return footprint.parameter_count(config, embeddings=embeddings) / 1e6


def test_sambay_at_depth_16() -> None:
    config = presets.build("sambay", 16)
    assert count(config) == footprint.parameter_count(config) == 1_065_818_688
    assert footprint.parameter_count(config, embeddings=False) == 1_002_330_688


def test_phi4_mini_flash() -> None:
    config = presets.phi4_mini_flash()
    assert count(config) == footprint.parameter_count(config) == 3_852_562_944


@pytest.mark.parametrize("name", MILLIONS_AT_16)
def test_family_at_depth_16(name: str) -> None:
    config = presets.build(name, 16)
    layers, total = MILLIONS_AT_16[name]
    assert footprint.parameter_count(config, embeddings=False) / 1e6 == pytest.approx(
        layers, abs=5e-3
    )
    assert count(config) / 1e6 == pytest.approx(total, abs=5e-3)


@pytest.mark.parametrize(
    ("name", "depth", "layers", "total"),
    [
        ("sambay", 8, 126.85, 158.60),
        ("sambay", 12, 424.59, 472.21),
        ("sambay", 20, 1952.90, 2032.26),
        ("sambay", 24, 3369.15, 3464.38),
        ("samba+yoco", 8, 128.81, 161.07),
        ("samba+yoco", 24, 3384.55, 3481.32),
        ("transformer++", 8, 121.65, 154.42),
        ("samba+yoco", 12, 428.88, 477.26),
        ("samba+yoco", 20, 1964.02, 2044.66),
        ("transformer++", 12, 410.56, 459.71),
        ("transformer++", 20, 1900.65, 1982.57),
        ("transformer++", 24, 3284.29, 3382.59),
    ],
)
def test_other_depths(name: str, depth: int, layers: float, total: float) -> None:
    config = presets.build(name, depth)
    assert footprint.parameter_count(config, embeddings=False) / 1e6 == pytest.approx(
        layers, abs=5e-3
    )
    assert footprint.parameter_count(config) / 1e6 == pytest.approx(total, abs=5e-3)


def test_every_preset_has_its_published_pattern() -> None:
    built = {name: presets.build(name, 16).layer_pattern for name in presets.NAMES}
    assert built == PATTERNS_AT_16
    assert presets.phi4_mini_flash().layer_pattern == "8x(M S) M F 7x(G C)"


@pytest.mark.parametrize("name", presets.NAMES)
@pytest.mark.parametrize(
    "fields", [{}, {"norm": "layer", "attention_bias": True}, {"tie_embeddings": False}]
)
def test_arithmetic_equals_modules(name: str, fields: dict) -> None:
    config = tiny_config(name, **fields)
    assert count(config) == footprint.parameter_count(config)


@pytest.mark.parametrize("name", presets.NAMES)
@pytest.mark.parametrize("length", [3, 5, 64])
def test_cache_bytes_equal_buffers(name: str, length: int) -> None:
    config = tiny_config(name)
    cache = ModelCache.allocate(config, 3, length, torch.bfloat16, "cpu")
    assert cache.nbytes == footprint.cache_bytes(config, 3, length, kv_bytes=2, state_bytes=4)


def test_published_cache_sizes_at_32k() -> None:
    def mib(name: str, window: int | None) -> float:
        config = presets.build(name, 16, window=window)
        return footprint.cache_bytes(config, 1, 32_768, kv_bytes=2, state_bytes=4) / 2**20

    assert mib("transformer++", None) == 1024
    assert mib("transformer-ls", 256) == 262
    assert mib("swa+yoco", 128) == 66.25
    assert mib("sambay", 256) == pytest.approx(67.3, abs=0.2)
    assert mib("mambay", None) == pytest.approx(66.3, abs=0.3)


def test_share_of_the_prompt_stage() -> None:
    assert footprint.prefill_share(presets.phi4_mini_flash()) == pytest.approx(0.560, abs=1e-3)
    assert footprint.prefill_share(presets.build("sambay", 16)) == pytest.approx(0.588, abs=5e-3)


@pytest.mark.parametrize("tokens", [1, 4, 5, 6, 50])
@pytest.mark.parametrize("window", [None, 1, 5])
def test_visible_pairs_by_counting(tokens: int, window: int | None) -> None:
    pairs = [
        (i, j)
        for i in range(tokens)
        for j in range(tokens)
        if j <= i and (window is None or j > i - window)
    ]
    assert footprint.visible_pairs(tokens, window) == len(pairs)


@pytest.mark.parametrize("name", FAMILY)
def test_training_flops_of_matrix_products_equal_those_that_torch_counts(name: str) -> None:
    tokens = 9
    for tied in (True, False):
        model = tiny_model(name, dtype=torch.float32, tie_embeddings=tied).train()
        with FlopCounterMode(display=False) as counter:
            model(random_ids(1, tokens)).sum().backward()
        counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
        assert footprint.training_flops(model.config, tokens, attention=False) == counted


def test_training_flops_of_the_head_and_of_the_visible_pairs() -> None:
    config = tiny_config("transformer-ls")  # window 5, every fourth layer sees all
    tokens = 9
    whole = footprint.training_flops(config, tokens)
    head = 6 * tokens * config.vocab_size * config.hidden_size
    assert whole - footprint.training_flops(config, tokens, head=False) == head
    pairs = sum(45 if layer.window is None else 5 * 6 // 2 + 4 * 5 for layer in config.layers)
    attention = whole - footprint.training_flops(config, tokens, attention=False)
    assert attention == 3 * 4 * config.attention_size * pairs
