"""The language model: embedding, blocks, norm and head. It has no idea which variant it is.

Shape letters: B batch or slots, T columns, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sambay.errors import ConfigError, nearest
from sambay.layers.context import BatchContext, SharedStates
from sambay.layers.norm import make_norm
from sambay.layers.projection import Linear, few_rows
from sambay.layers.roles import Role
from sambay.layers.slots import SlotLayer, SlotStep
from sambay.model.block import Block
from sambay.model.cache import ModelCache
from sambay.model.decoder import run_blocks
from sambay.model.init import initialise
from sambay.model.recompute import CALLS, Recompute
from sambay.ops.decode import embed_rows
from sambay.spec import ModelConfig, prefill_split

Outputs = Literal["all", "last", "none"]
_KEEP: dict[str, int | None] = {"all": None, "last": 1, "none": 0}


class LanguageModel(nn.Module):
    """A decoder described by its configuration alone.

    Built on a real device it is initialised with the default scheme and seed 0; built under
    `torch.device("meta")` it only has shapes. `recompute` says how much of each block the backward
    pass computes again.
    """

    roles: ClassVar = {"embedding.weight": Role.EMBEDDING, "head.weight": Role.OUTPUT}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Its own initialisation would be thrown away, and on "meta" imports torch's compiler.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embedding = nn.Embedding.from_pretrained(table, freeze=False)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in config.layers)
        self.norm = make_norm(config)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.split = prefill_split(config.layers)
        self.recompute: Recompute = "none"
        if not self.head_weight.is_meta:
            initialise(self)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix, (V, D); the embedding itself when tied."""
        return self.head.weight

    def forward(
        self,
        input_ids_BT: Tensor,
        *,
        segments: Tensor | None = None,
        starts: Tensor | None = None,
        cache: ModelCache | None = None,
        outputs: Outputs = "all",
    ) -> Tensor:
        """The logits, (B, T, V), or of the last column only; arguments as in `hidden_states`."""
        h = self.hidden_states(
            input_ids_BT, segments=segments, starts=starts, cache=cache, outputs=outputs
        )
        return self.logits(h)

    def logits(self, h_BTD: Tensor) -> Tensor:
        """(B, T, D) hidden states to (B, T, V) logits."""
        return self.head(h_BTD)

    def hidden_states(
        self,
        input_ids_BT: Tensor,
        *,
        segments: Tensor | None = None,
        starts: Tensor | None = None,
        cache: ModelCache | None = None,
        outputs: Outputs = "all",
    ) -> Tensor:
        """What the head reads: (B, T, D) after the final norm and the logit multiplier.

        segments: (B, T) int32, document numbers of packed rows.
        starts: (B,) int64, left-padding columns of each row; with a cache they are the cache's.
        cache: state to continue and to advance; not for training.
        outputs: "all" columns; the "last" only, for which nothing behind the last layer that keeps
            state is computed for earlier columns (linear prefill, arXiv 2507.06607, section 2); or
            "none", which only advances the cache and returns (B, 0, D).

        Raises:
            ConfigError: arguments that exclude each other.
        """
        context = self._context(input_ids_BT, segments, starts, cache, outputs)
        states = [None] * len(self.blocks) if cache is None else cache.layers
        x = self._embedded(input_ids_BT)
        recompute = self.recompute if torch.is_grad_enabled() else "none"
        x = run_blocks(
            self.blocks,
            states,
            x,
            context,
            split=self.split,
            keep=_KEEP[outputs],
            call=CALLS[recompute],
        )
        if cache is not None:
            cache.length += input_ids_BT.shape[1]
        return self.norm(x) * self.config.logit_multiplier

    @torch.inference_mode()
    def decode(self, tokens_B: Tensor, step: SlotStep, layers: Sequence[SlotLayer]) -> Tensor:
        """The logits (B, V) after one more token in every slot, by which all states are advanced.

        tokens_B: (B,) int64, of idle slots any. Logits of idle slots mean nothing.
        layers: of every block, in their order.
        """
        x_BD, shared = self._embedded_rows(tokens_B), SharedStates()
        for block, layer in zip(self.blocks, layers, strict=True):
            assert isinstance(block, Block)
            x_BD, shared = block.decode(x_BD, step, shared, layer)
        return few_rows(self.head, self.norm.decode(x_BD, self.config.logit_multiplier))

    def _embedded(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        return x.to(torch.promote_types(x.dtype, torch.float32)) * self.config.embedding_multiplier

    def _embedded_rows(self, tokens_B: Tensor) -> Tensor:
        if type(self.embedding) is not nn.Embedding:  # an adapter, for one
            return self._embedded(tokens_B)
        factor = self.config.embedding_multiplier
        return embed_rows(tokens_B, self.embedding.weight, factor=factor)

    def _context(
        self,
        input_ids: Tensor,
        segments: Tensor | None,
        starts: Tensor | None,
        cache: ModelCache | None,
        outputs: str,
    ) -> BatchContext:
        if outputs not in _KEEP:
            raise ConfigError(f"outputs = '{outputs}' is unknown{nearest(outputs, _KEEP)}")
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ConfigError(
                f"input_ids has shape {tuple(input_ids.shape)}; expected (batch, columns) with at "
                "least one column"
            )
        if segments is not None and (cache is not None or outputs != "all"):
            raise ConfigError("segments: packed rows are for training; use no cache, outputs='all'")
        if cache is None:
            max_start = 0 if starts is None else int(starts.max())
            return BatchContext(0, input_ids.shape[1], starts, max_start, segments)
        if starts is not None:
            raise ConfigError("starts: the cache has its own; give them to ModelCache.allocate")
        return cache.context(input_ids.shape[1])
