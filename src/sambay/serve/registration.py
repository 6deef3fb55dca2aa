"""Telling vLLM where the model classes, their configurations and their checks are."""

from __future__ import annotations

from sambay.errors import MissingPackage

try:
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models import config as model_checks
    from vllm.transformers_utils import config as configurations
except ModuleNotFoundError as error:
    raise MissingPackage("vllm", "serving", "vllm") from error

from sambay.serve.configuration import (
    ATTENTION_ONLY,
    HYBRID,
    ServedConfig,
    ServedOfficialConfig,
)
from sambay.serve.verification import Verification

# The official name is only what old files say; the class follows from the layers.
MODELS = {
    HYBRID: "sambay.serve.model:SambaYForCausalLM",
    ATTENTION_ONLY: "sambay.serve.model:SambaYAttentionForCausalLM",
}


def install() -> None:
    """Register everything; what is registered already is replaced by the same."""
    for config in (ServedConfig, ServedOfficialConfig):
        configurations._CONFIG_REGISTRY[config.model_type] = config
    for architecture, where in MODELS.items():
        if architecture not in ModelRegistry.models:
            ModelRegistry.register_model(architecture, where)
        model_checks.MODELS_CONFIG_MAP[architecture] = Verification
