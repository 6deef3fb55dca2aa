from __future__ import annotations

import json
import math

import pytest

from sambay.errors import ConfigError
from sambay.spec import ModelConfig, presets
from tests.tiny import tiny_config


@pytest.mark.parametrize("name", presets.NAMES)
def test_json_round_trip(name: str) -> None:
    config = presets.build(name, 8)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"window": 0}, "window = 0.*1 or more"),
        ({"window": -3}, "window = -3"),
        ({"vocab_size": 0}, "vocab_size = 0"),
        ({"hidden_size": 3.5}, "hidden_size = 3.5.*whole number"),
        ({"num_heads": True}, "num_heads = True"),
        ({"num_kv_heads": 3}, "num_kv_heads = 3 does not divide num_heads = 8"),
        ({"attention_variant": "differental"}, "did you mean 'differential'"),
        ({"norm": "batch"}, "norm = 'batch'"),
        ({"norm_eps": float("nan")}, "norm_eps"),
        ({"tie_embeddings": 1}, "tie_embeddings = 1.*true or false"),
        ({"hiden_size": 4}, "did you mean 'hidden_size'"),
        ({"layer_pattern": "M S G C"}, "layer 3"),
        ({"head_dim": 8}, "attention_scale"),
        ({"layer_pattern": "M S M F"}, "residual_multiplier"),
    ],
)
def test_impossible_fields_are_named(change: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        tiny_config("sambay").replace(**change)
    assert "\n" not in str(caught.value)


def test_odd_heads_exclude_differential_attention() -> None:
    for fields in ({"num_kv_heads": 1}, {"num_heads": 3, "num_kv_heads": 3}):
        with pytest.raises(ConfigError, match="odd; differential attention pairs heads"):
            tiny_config("sambay+da", **fields)
    with pytest.raises(ConfigError, match="num_kv_heads = 3 is odd"):
        presets.build("sambay+da", 12)


def test_odd_head_dim_excludes_rotation() -> None:
    with pytest.raises(ConfigError, match="head_dim = 5 is odd"):
        tiny_config("transformer++", head_dim=5)


def test_pattern_and_num_layers_must_agree() -> None:
    values = tiny_config("sambay").to_dict() | {"num_layers": 30}
    with pytest.raises(ConfigError, match="has 8 layers, num_layers says 30"):
        ModelConfig.from_dict(values)


def test_missing_field_is_named() -> None:
    values = tiny_config("sambay").to_dict()
    del values["num_heads"]
    with pytest.raises(ConfigError, match="num_heads: missing"):
        ModelConfig.from_dict(values)


def test_first_difference_names_field_and_both_values() -> None:
    config = tiny_config("sambay")
    assert config.first_difference(config.replace()) is None
    assert config.first_difference(config.replace(window=6)) == ("window", 5, 6)


def test_hidden_size_carries_the_rank_of_the_time_step_along() -> None:
    assert tiny_config("sambay").replace(hidden_size=160).dt_rank == 10


def test_fields_of_other_recurrences_stay_out_of_a_mamba_file() -> None:
    values = presets.build("sambay", 8).to_dict()
    assert not [name for name in values if name.startswith("recurrent")]
    assert "gated_memory" not in values
    both = presets.build("gdny+gdn", 8).to_dict()
    assert both["recurrent_norm"] == "before_gate"
    assert both["recurrent_heads"] == 3


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("sambay-2", {"recurrent_heads": 0}, "recurrent_heads: missing.*'mamba2' needs 1 or more"),
        ("gdny", {"recurrent_head_dim": 0}, "recurrent_head_dim: missing; .*'gated_delta'"),
        ("gdny", {"recurrent_heads": -1}, "recurrent_heads = -1.*whole number of 0"),
        ("gdny", {"recurrent_kind": "gated_dleta"}, "did you mean 'gated_delta'"),
        ("gdny", {"gated_memory": "normalized"}, "did you mean 'normalised'"),
        ("gdny", {"recurrent_kind": "mamba"}, "recurrent_heads = .*'mamba', which has no heads"),
        ("sambay", {"recurrent_head_dim": 8}, "recurrent_head_dim = 8, .*has no heads"),
        ("sambay", {"recurrent_norm": "before_gate"}, "recurrent_norm.*which has no norm"),
        ("sambay", {"recurrent_kind": "mamba2"}, "recurrent_heads: missing"),
    ],
)
def test_fields_that_the_recurrence_cannot_have(name: str, change: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        presets.build(name, 8).replace(**change)


def test_heads_of_a_recurrence_follow_its_sizes() -> None:
    def heads(name: str, depth: int, **fields: int) -> tuple[int, int, int]:
        config = presets.build(name, depth, **fields)
        return config.recurrent_heads, config.recurrent_head_dim, config.d_state

    assert heads("sambay-2", 16) == heads("mambay-2", 16) == (64, 64, 128)  # 4096 channels
    assert heads("gdny", 16) == heads("s-gdny", 16) == (6, 512, 256)  # values of 3072
    assert heads("sambay-2", 8, hidden_size=100, recurrent_head_dim=10) == (24, 10, 128)
    assert heads("gdny", 8, hidden_size=100, d_state=10) == (8, 20, 10)
    assert heads("gdny", 8, hidden_size=100, d_state=10, recurrent_heads=2) == (2, 20, 10)
    assert heads("sambay", 8, recurrent_kind="mamba2") == (32, 64, 128)
    with pytest.raises(ConfigError, match="d_state = 0"):
        presets.build("gdny", 8, d_state=0)


def test_multipliers_are_stored_numbers() -> None:
    config = presets.build("sambay", 32, head_dim=64)
    assert config.residual_multiplier == pytest.approx(1 / 8)
    assert config.logit_multiplier == pytest.approx(0.5)
    assert config.attention_scale == pytest.approx(math.sqrt(128) / 64)
    plain = presets.build("sambay", 32, head_dim=64, parametrization="standard")
    assert (plain.residual_multiplier, plain.logit_multiplier) == (1.0, 1.0)
    assert plain.attention_scale == pytest.approx(1 / 8)
    mup = presets.build("sambay", 32, parametrization="mup")
    assert (mup.residual_multiplier, mup.logit_multiplier) == (1.0, 0.5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: presets.build("sambey", 8), "did you mean 'sambay'"),
        (lambda: presets.build("sambay", 10), "depth = 10.*choose 4, 8, 12"),
        (lambda: presets.build("sambay", 0), "depth = 0"),
        (lambda: presets.build("sambay", 8, windw=3), "did you mean 'window'"),
        (lambda: presets.build("sambay", 8, parametrization="mu"), "parametrization 'mu'"),
    ],
)
def test_bad_presets_are_named(call, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        call()
