"""What vLLM is told about a model: its own words for a `ModelConfig`, native or official."""

from __future__ import annotations

from typing import Any, ClassVar

from sambay.hf import official
from sambay.model.folder import MODEL_TYPE, layer_types, parse_config
from sambay.spec import LayerKind, ModelConfig

try:
    from transformers import PreTrainedConfig
except ModuleNotFoundError as error:
    from sambay.errors import MissingPackage

    raise MissingPackage("transformers", "serving", "vllm") from error

from sambay.serve.heads import plan_heads
from sambay.serve.platform import attention_head_sizes

# vLLM treats models with recurrent layers otherwise, and asks the class, not the configuration.
HYBRID, ATTENTION_ONLY = "SambaYForCausalLM", "SambaYAttentionForCausalLM"
NO_LIMIT = 1 << 20  # the architecture has no longest text; vLLM asks for one


class ServedConfig(PreTrainedConfig):
    """A model as vLLM wants it described; the model itself is built from `model_config`.

    Differs from the classes of `sambay.hf` where vLLM's words mean what its attention stores: a
    pair of key heads is one head there (see `sambay.serve.heads`).

    Raises:
        ConfigError: what is in the file cannot work, or cannot be served.
    """

    model_type = MODEL_TYPE
    has_no_defaults_at_init = True
    parse: ClassVar[Any] = staticmethod(parse_config)

    def __init__(self, **values: Any) -> None:
        config = type(self).parse({**values, "model_type": self.model_type})
        kinds = [layer.kind for layer in config.layers]
        plan = plan_heads(config, 1, attention_head_sizes())
        kept = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id")
        super().__init__(**{name: values[name] for name in kept if values.get(name) is not None})
        self.model_fields_of_sambay = config.to_dict()
        self.architectures = [HYBRID if LayerKind.MAMBA in kinds else ATTENTION_ONLY]
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        self.intermediate_size = config.intermediate_size
        self.num_hidden_layers = config.num_layers
        self.num_attention_heads = config.num_heads
        self.num_key_value_heads, self.head_dim = plan.key_units, plan.size
        # Mixed values, or vLLM gives one window to all layers.
        self.layer_types = layer_types(config)
        self.layers_block_type = ["mamba" if k is LayerKind.MAMBA else "attention" for k in kinds]
        self.sliding_window = config.window if LayerKind.SLIDING in kinds else None
        self.max_position_embeddings = values.get("max_position_embeddings") or NO_LIMIT
        self.tie_word_embeddings = config.tie_embeddings
        self.quantization_config = values.get("quantization_config")
        if self.quantization_config is None:
            del self.quantization_config  # vLLM asks whether there is one

    def model_config(self) -> ModelConfig:
        """The architecture."""
        return ModelConfig.from_dict(self.model_fields_of_sambay)


class ServedOfficialConfig(ServedConfig):
    """The same for the official checkpoints."""

    model_type = official.MODEL_TYPE
    parse: ClassVar[Any] = staticmethod(official.parse)

    # transformers writes one for every subclass that has none of its own.
    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
