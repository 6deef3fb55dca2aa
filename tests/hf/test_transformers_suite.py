"""transformers' own tests for models, on our classes.

They are not part of transformers' wheel, so this file needs a source tree of it: see
`tests.hf.transformers_source`. What is skipped, and why, is in `SKIPPED`; everything else a mixin
skips by itself, with its own reason.
"""

from __future__ import annotations

import abc
import unittest
import unittest.mock
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from sambay.hf.configuration import Phi4FlashConfig, SambaYConfig
from sambay.hf.modeling import (
    Phi4FlashForCausalLM,
    Phi4FlashModel,
    SambaYForCausalLM,
    SambaYModel,
)
from tests.hf.transformers_source import mixins, unavailable

if reason := unavailable():
    pytest.skip(reason, allow_module_level=True)

SUITE, MISSING = mixins()
_CHECKPOINTED = (
    "blocks are not transformers' checkpointing layers; test_modeling compares gradients"
)
# A test, or a test of one class, and why it does not apply. The mixins skip others by themselves.
SKIPPED: dict[str, str] = {
    "test_num_layers_is_small": "every kind of layer needs more than two",
    "test_gradient_checkpointing_enable_disable": _CHECKPOINTED,
    "test_training_gradient_checkpointing": _CHECKPOINTED,
    "test_training_gradient_checkpointing_use_reentrant_false": _CHECKPOINTED,
    "test_training_gradient_checkpointing_use_reentrant_true": _CHECKPOINTED,
    "SambaYTest.test_keep_in_fp32_modules_exist": "softmax variants have no lambdas to keep",
}


class SmallModel(abc.ABC):
    """What the mixins ask about a model: a small configuration, and inputs for it."""

    batch_size, seq_length, is_training = 3, 7, True
    hidden_size, num_attention_heads, vocab_size = 32, 4, 61

    def __init__(self, case: unittest.TestCase) -> None:
        self.parent = case

    @abc.abstractmethod
    def get_config(self) -> Any:
        """A configuration of the smallest model that has every kind of layer."""

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Tensor]]:
        shape = (self.batch_size, self.seq_length)
        ids = torch.randint(2, self.vocab_size, shape)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class SmallSambaY(SmallModel):
    """Every kind of layer once, and window layers on both sides of a Mamba layer."""

    num_hidden_layers = 6

    def get_config(self) -> SambaYConfig:
        return SambaYConfig(
            layer_pattern="M S M F G C",
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=40,
            num_heads=self.num_attention_heads,
            num_kv_heads=2,
            head_dim=8,
            window=4,
            d_state=3,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=1,
        )


class SmallPhi4Flash(SmallModel):
    """The smallest depth of the official layout that has every kind of layer."""

    num_hidden_layers = 8

    def get_config(self) -> Phi4FlashConfig:
        return Phi4FlashConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=40,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            sliding_window=4,
            mamba_d_state=3,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=1,
        )


# Where the mixins look up, by class name, what a class is for.
MODEL_MAPPING_NAMES.update(sambay="SambaYModel", phi4flash="Phi4FlashModel")
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.update(
    sambay="SambaYForCausalLM", phi4flash="Phi4FlashForCausalLM"
)


class Suite(SUITE.ModelTesterMixin, SUITE.GenerationTesterMixin):
    """Both mixins, without what `SKIPPED` lists."""

    all_model_classes: tuple[type, ...] = ()
    small: type[SmallModel]
    has_attentions = False  # attention maps are never formed as a whole

    test_can_init_all_missing_weights_before_2023 = True  # run it: our files carry no year

    def setUp(self) -> None:
        self.model_tester = self.small(self)
        name = self._testMethodName
        reason = SKIPPED.get(name) or SKIPPED.get(f"{type(self).__name__}.{name}")
        if reason:
            self.skipTest(reason)


class SambaYTest(Suite, unittest.TestCase):
    small = SmallSambaY
    all_model_classes = (SambaYModel, SambaYForCausalLM)


class Phi4FlashTest(Suite, unittest.TestCase):
    small = SmallPhi4Flash
    all_model_classes = (Phi4FlashModel, Phi4FlashForCausalLM)

    def test_batching_equivalence(self) -> None:
        """With the epsilon of the official class, which the mixin would make larger."""
        with unittest.mock.patch.object(SUITE, "set_config_for_less_flaky_test") as made_larger:
            super().test_batching_equivalence()
        assert made_larger.called, "the mixin leaves the epsilon alone: this override can go"

    def test_reverse_loading_mapping(self) -> None:
        """The official names begin with "model.", which a base model alone does not have."""
        base = Phi4FlashModel(self.model_tester.get_config())
        assert not any(name.startswith("model.") for name in base.state_dict())
        super().test_reverse_loading_mapping(skip_base_model=True)


def test_skipped_names_exist() -> None:
    """A name that no mixin has any more would hide nothing, and should go."""
    known = {name for name in dir(Suite) if name.startswith("test_")}
    missing = {name.split(".")[-1] for name in SKIPPED} - known
    assert not missing or MISSING, missing
