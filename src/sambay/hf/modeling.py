"""The models as transformers' classes: the same blocks, behind transformers' arguments.

Shape letters: B batch, T columns of this call, S columns so far, D hidden, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sambay.errors import ConfigError, MissingPackage

try:
    from transformers import Cache, DynamicCache, GenerationMixin
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
    from transformers.utils.generic import can_return_tuple
except ModuleNotFoundError as error:
    raise MissingPackage("transformers", "the classes of transformers", "hf") from error

from sambay.hf.cache import SELF_ATTENTION, columns_seen, layer_states
from sambay.hf.columns import read_columns
from sambay.hf.configuration import DecoderConfig, Phi4FlashConfig
from sambay.hf.conversion import register_official_names
from sambay.hf.pretrained import SambaYPreTrainedModel
from sambay.layers.context import BatchContext, SharedStates
from sambay.layers.norm import make_norm
from sambay.layers.projection import Linear
from sambay.layers.state import LayerState
from sambay.model.block import Block
from sambay.model.decoder import call_block, run_blocks
from sambay.spec import prefill_split


class SambaYModel(SambaYPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.model_config = model = config.model_config()
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        self.blocks = nn.ModuleList(Block(model, layer) for layer in model.layers)
        self.norm = make_norm(model)
        self.split = prefill_split(model.layers)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        keep: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The states after the final norm and the logit multiplier, (B, T, D).

        attention_mask: (B, S), 0 on padding, which may stand on the left or on the right.
        position_ids: only read to find packed documents: where they start again from a lower
            number (and there is neither mask nor cache), a new document begins, and attention,
            convolution and scan are cut there.
        keep: compute only the last `keep` columns behind the last layer that keeps state (linear
            prefill); with padding on the right, `keep=1` is the last real column of each row.

        Raises:
            ConfigError: arguments that exclude each other.
        """
        self._refuse(input_ids, inputs_embeds, kwargs)
        output_hidden_states = _chosen(output_hidden_states, self.config.output_hidden_states)
        wants_cache = _chosen(use_cache, self.config.use_cache)
        source = input_ids if inputs_embeds is None else inputs_embeds
        assert source is not None
        offset = self._columns_seen(past_key_values, attention_mask, source.shape[1])
        columns = read_columns(source, attention_mask, position_ids, offset, past_key_values)
        packed = columns.context.segments is not None  # nobody continues several documents at once
        if past_key_values is None and wants_cache and not packed and not self._trains():
            past_key_values = DynamicCache(config=self.config)
        if keep is not None and keep > (1 if columns.order is not None else source.shape[1]):
            keep = None
        x = self.embedding(columns.source) if inputs_embeds is None else columns.source
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = x * self.model_config.embedding_multiplier
        seen: list[Tensor] = []
        call = self._checkpointed if self.gradient_checkpointing and self._trains() else call_block
        devices = [_device_of(block) for block in self.blocks]
        x = run_blocks(
            self.blocks,
            layer_states(past_key_values, self.model_config, x.shape[0], devices),
            x,
            columns.context,
            split=self.split,
            keep=None if output_hidden_states else keep,
            call=functools.partial(_observed, call, seen) if output_hidden_states else call,
        )
        h = columns.restore(self.norm(x) * self.model_config.logit_multiplier)
        return BaseModelOutputWithPast(
            last_hidden_state=h,
            past_key_values=past_key_values if wants_cache else None,
            hidden_states=(*map(columns.restore, seen), h) if output_hidden_states else None,
        )

    def _refuse(self, ids: Tensor | None, embeds: Tensor | None, kwargs: dict[str, Any]) -> None:
        if (ids is None) == (embeds is None):
            raise ConfigError("give input_ids or inputs_embeds, and not both")
        if kwargs.get("output_attentions"):
            raise ConfigError(
                "output_attentions: attention maps are never formed as a whole; leave it out"
            )

    def _trains(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _columns_seen(self, cache: Cache | None, mask: Tensor | None, T: int) -> int:
        seen = columns_seen(cache, self.model_config.layers)
        if seen == 0 and cache is not None and mask is not None and mask.dim() == 2:
            counts = any(hasattr(layer, "keys") for layer in cache.layers)
            if not counts:  # without attention no layer counts, but the mask is as long
                return mask.shape[1] - T
        return seen

    def _checkpointed(
        self,
        block: nn.Module,
        x: Tensor,
        context: BatchContext,
        shared: SharedStates,
        state: LayerState | None,
    ) -> tuple[Tensor, SharedStates]:
        """Recompute the block in the backward pass; flat tensors, as reentrant checkpoints need."""

        def run(x: Tensor, *values: Tensor | None) -> tuple[Tensor | None, ...]:
            y, after = block(x, context, SharedStates(*values), state)
            return (y, *after)

        y, *values = self._gradient_checkpointing_func(run, x, *shared)
        return y, SharedStates(*values)


class SambaYForCausalLM(SambaYPreTrainedModel, GenerationMixin):
    """The language model: `SambaYModel` and a head, tied to the embedding if so configured."""

    is_whole_model = True
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embedding.weight"}

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.model = SambaYModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _supports_default_dynamic_cache(self) -> bool:
        """Whether `generate` should make the cache.

        It asks a cache for its length, which only attention layers know; a model without attention
        makes its cache in the first forward.
        """
        return any(layer.kind in SELF_ATTENTION for layer in self.config.layers)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, (B, T, V); with labels also the loss.

        logits_to_keep: the last n columns only (0: all), or a tensor of column indices. For a
            number, unless labels or hidden states are asked for, the columns before them are not
            computed behind the last layer that keeps state: prefill is linear, and `generate`,
            which asks for one column, gets it (arXiv 2507.06607, section 2).

        The other arguments are those of `SambaYModel`.
        """
        count = logits_to_keep if isinstance(logits_to_keep, int) and labels is None else 0
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            keep=count if count > 0 else None,
            return_dict=True,
            **{name: value for name, value in kwargs.items() if name == "output_attentions"},
        )
        h = outputs.last_hidden_state
        h = h[:, -count:] if count else h
        if isinstance(logits_to_keep, Tensor):
            h = h[:, logits_to_keep]
        logits = self.lm_head(h)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


class Phi4FlashModel(SambaYModel):
    """`SambaYModel` of an official checkpoint."""

    config_class = Phi4FlashConfig


class Phi4FlashForCausalLM(SambaYForCausalLM):
    """The class of the official checkpoints; loads and saves their tensor names."""

    config_class = Phi4FlashConfig

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Write a folder under the official names.

        Raises:
            ConfigError: a quantised model; its parts cannot be joined to the official tensors.
        """
        if getattr(self.config, "quantization_config", None) is not None:
            raise ConfigError(
                "the official layout has no quantised form; convert the folder to the native one "
                "(sambay convert), load that quantised and save it"
            )
        super().save_pretrained(*args, **kwargs)


register_official_names(Phi4FlashConfig.model_type)


def _chosen(argument: bool | None, default: bool | None) -> bool:
    return bool(default if argument is None else argument)


def _observed(call: Any, seen: list[Tensor], block: nn.Module, x: Tensor, *rest: Any) -> Any:
    seen.append(x)
    return call(block, x, *rest)


def _device_of(block: nn.Module) -> torch.device:
    """Where a block computes; with offloading its parameters may lie elsewhere."""
    hook = getattr(block, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return next(block.parameters()).device if device is None else torch.device(device)
