"""What all our classes of transformers share: loading with checks, initialisation, precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sambay.errors import MissingPackage

try:
    from transformers import PreTrainedConfig, PreTrainedModel
except ModuleNotFoundError as error:
    raise MissingPackage("transformers", "the classes of transformers", "hf") from error

from sambay.hf import preflight
from sambay.hf.configuration import SambaYConfig
from sambay.layers.attention import DifferentialMaps
from sambay.layers.gated_delta import GatedDelta
from sambay.layers.mamba import Mamba
from sambay.layers.mamba2 import Mamba2
from sambay.model.init import embedding_fill, head_fill, module_fills
from sambay.spec import InitScheme


class SambaYPreTrainedModel(PreTrainedModel):
    """What transformers has to know about all our classes."""

    config_class = SambaYConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["Block"]
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    is_whole_model: ClassVar = False  # whether its parameters are those of a model folder
    _is_stateful = True  # recurrent states cannot be rolled back
    _supports_sdpa = True
    _keep_in_fp32_modules_strict: ClassVar = {
        *Mamba.float32_parameters,
        *Mamba2.float32_parameters,
        *GatedDelta.float32_parameters,
        *DifferentialMaps.float32_parameters,
    }

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        config: Any = None,
        use_safetensors: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model of a folder or repository; the files of a local folder are checked first.

        Raises:
            CheckpointMismatch: a config.json of another model type; tensors that are missing, left
                over or of another shape (unless `ignore_mismatched_sizes`); files that are
                incomplete; only pickled weights (unless `use_safetensors=False`).
        """
        folder = preflight.model_folder(pretrained_model_name_or_path, kwargs)
        if folder is not None:
            cls._check(folder, config, kwargs, pickled=use_safetensors is False)
        return super().from_pretrained(
            pretrained_model_name_or_path,
            *model_args,
            config=config,
            use_safetensors=use_safetensors,
            **kwargs,
        )

    @classmethod
    def _check(cls, folder: Path, config: Any, kwargs: dict[str, Any], *, pickled: bool) -> None:
        assert cls.config_class is not None, "every class here has one"
        model_type = cls.config_class.model_type
        if not isinstance(config, PreTrainedConfig):
            source = folder if config is None else Path(config)
            preflight.check_model_type(source, model_type)
            options: dict[str, Any] = kwargs | {"subfolder": ""}
            config = cls.config_class.from_pretrained(source, **options)
        preflight.check_class(config.model_type, model_type)
        if getattr(config, "quantization_config", None) or getattr(
            config, "transformers_weights", None
        ):
            return
        weights = preflight.check_files(folder, pickled=pickled)
        # A class with parameters of its own may add them to a folder that has none.
        if weights is not None and cls.is_whole_model:
            preflight.check_tensors(weights, config.model_config(), model_type)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fill the parameters of one module that no checkpoint has filled.

        The rules are those of `sambay.model.init` under the configured scheme; the numbers come
        from torch's global generator, as everywhere in transformers.
        """
        config, scheme = self.config.model_config(), InitScheme(self.config.init_scheme)
        fills = module_fills(module, config, scheme)
        if isinstance(module, nn.Linear) and module is self.get_output_embeddings():
            fills = [(module.weight, head_fill(scheme))]
        elif isinstance(module, nn.Embedding):
            fills = [(module.weight, embedding_fill(config))]
        for parameter, fill in fills:
            if not (parameter.is_meta or getattr(parameter, "_is_hf_initialized", False)):
                value = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
                fill(value, torch.default_generator)
                parameter.copy_(value)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """The mask as it is: attention takes no (T, S) masks here, also with static caches."""
        return attention_mask
