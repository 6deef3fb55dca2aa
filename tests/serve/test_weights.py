"""Stored tensors find their parameters; the supported versions are the stated ones."""

from __future__ import annotations

import pytest
import torch

from sambay.errors import BackendUnavailable, CheckpointMismatch
from sambay.hf import key_map
from sambay.model.folder import stored_name, stored_tensors
from sambay.serve.versions import refuse_other_versions
from sambay.serve.weights import native_tensors, parameter_name, require_all
from tests.serve.served_models import OFFICIAL, SIZES
from tests.tiny import tiny_config, tiny_model


def test_official_tensors_arrive_under_native_names_with_their_values() -> None:
    model = tiny_model("sambay+da", dtype=torch.float32, **SIZES, **OFFICIAL)
    own = stored_tensors(model)
    stored = [
        (rule.official, key_map.to_official(rule, [own[name] for name in rule.ours]))
        for rule in key_map.rules(model.config)
    ]
    found = dict(native_tensors(model.config, "phi4flash", stored))
    assert found.keys() == {stored_name(name) for name in own}
    assert all(torch.equal(found[stored_name(name)], tensor) for name, tensor in own.items())


def test_tensors_of_another_model_are_refused() -> None:
    config = tiny_config("sambay+da", **SIZES, **OFFICIAL)
    with pytest.raises(CheckpointMismatch, match=r"model\.nonsense is no tensor"):
        list(native_tensors(config, "phi4flash", [("model.nonsense", torch.zeros(1))]))
    with pytest.raises(CheckpointMismatch, match="tie_word_embeddings"):
        list(native_tensors(config, "phi4flash", [("lm_head.weight", torch.zeros(1))]))
    with pytest.raises(CheckpointMismatch, match=r"1 of the model's tensors .* that of b"):
        require_all({"a": torch.nn.Parameter(), "b": torch.nn.Parameter()}, {"a"})


def test_names_of_parameters_that_are_kept_in_another_form() -> None:
    mamba, dual = tiny_config("sambay"), tiny_config("sambay-2")
    assert parameter_name("model.blocks.0.mixer.A_log", mamba) == "model.blocks.0.mixer.A"
    assert parameter_name("model.blocks.0.mixer.A_log", dual) == "model.blocks.0.mixer.inner.A_log"
    for name in ("model.blocks.1.mixer.q_proj.weight", "lm_head.weight", "model.norm.weight"):
        assert parameter_name(name, mamba) == parameter_name(name, dual) == name


@pytest.mark.parametrize("version", ["0.26.0", "0.30.1", "0.32.0+cpu", "0.32.1.post1"])
def test_supported_versions(version: str) -> None:
    refuse_other_versions(version)


@pytest.mark.parametrize("version", ["0.25.1", "0.33.0", "1.0.0", "dev"])
def test_other_versions_are_refused_with_the_range(version: str) -> None:
    with pytest.raises(BackendUnavailable, match=r"0\.26 to 0\.32.*pip install"):
        refuse_other_versions(version)
