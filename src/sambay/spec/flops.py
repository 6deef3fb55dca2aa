"""Floating-point operations of a forward and of learning, part by part, by arithmetic.

A multiply and an add are two operations, an exponential is one. Norms, activations, gates,
rotations and residual additions are left out: they grow with the sizes, what is counted with their
products. The paper's own axis is another, 6 N T of the Transformer++ of the same depth for every
architecture (arXiv 2507.06607, section 3), which `sambay.scaling.horizon.published_flops` gives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from sambay.errors import ConfigError
from sambay.spec.footprint import layer_cost, pair_flops, visible_pairs
from sambay.spec.layers import LayerKind
from sambay.spec.model_config import ModelConfig
from sambay.spec.recurrent import RecurrentKind, conv_channels

CHUNK = 64  # tokens; what the backends in plain torch take for large heads


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of one row.

    projections: products with the matrices of mixers and MLPs.
    attention: queries with the keys they see, and values with their weights.
    recurrence: the scan or the delta rule.
    convolution: the short ones before it.
    head: the product with the output matrix.
    embedding: none, rows are looked up.
    """

    projections: int
    attention: int
    recurrence: int
    convolution: int
    head: int
    embedding: int = 0

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(dataclasses.astuple(self))

    @property
    def in_mixers(self) -> int:
        """What mixes tokens: attention, recurrence and convolution."""
        return self.attention + self.recurrence + self.convolution

    def times(self, factor: int) -> Flops:
        """Every part multiplied."""
        return Flops(*(factor * part for part in dataclasses.astuple(self)))


def forward_parts(config: ModelConfig, tokens: int, *, chunk: int | None = CHUNK) -> Flops:
    """The operations of one row's forward over `tokens`, all of whose logits are computed.

    `chunk` is how many tokens Mamba-2 and Gated DeltaNet take at once; None for one after another.
    Mamba-1 always does that: its decay differs per channel and state, so there are no products of
    matrices in it.

    Raises:
        ConfigError: fewer than one token, also per chunk.
    """
    for name, value in (("tokens", tokens), ("chunk", 1 if chunk is None else chunk)):
        if value < 1:
            raise ConfigError(f"flops: {name} = {value}; it must be 1 or more")
    costs = [layer_cost(config, layer) for layer in config.layers]
    attending = [
        layer
        for layer in config.layers
        if layer.kind in (LayerKind.SLIDING, LayerKind.FULL, LayerKind.CROSS)
    ]
    recurrent = sum(layer.kind is LayerKind.MAMBA for layer in config.layers)
    convolution = 2 * tokens * config.d_conv * conv_channels(config)
    return Flops(
        projections=2 * tokens * sum(cost.mixer_matmul + cost.mlp for cost in costs),
        attention=pair_flops(config)
        * sum(visible_pairs(tokens, layer.window) for layer in attending),
        recurrence=recurrent * recurrence_flops(config, tokens, chunk=chunk),
        convolution=recurrent * convolution,
        head=2 * tokens * config.vocab_size * config.hidden_size,
    )


def training_parts(config: ModelConfig, tokens: int, *, chunk: int | None = CHUNK) -> Flops:
    """The operations of learning from one row of `tokens`: three times those of the forward.

    A product's backward is two products of the same size; recurrences are counted by the same
    rule. What is computed again to save memory does not count.
    """
    return forward_parts(config, tokens, chunk=chunk).times(3)


def recurrence_flops(config: ModelConfig, tokens: int, *, chunk: int | None = CHUNK) -> int:
    """The operations of one layer's recurrence over `tokens`, see `forward_parts`."""
    kind = config.recurrent_kind
    if chunk is None or kind is RecurrentKind.MAMBA:
        return tokens * _PER_TOKEN[kind](config)
    whole, rest = divmod(tokens, chunk)
    count = _PER_CHUNK[kind]
    return whole * count(config, chunk) + (count(config, rest) if rest else 0)


def _mamba_token(config: ModelConfig) -> int:
    """Decay (2), input, state (3), read-out (2) per channel and state; time step and skip (4)."""
    return 7 * config.d_inner * config.d_state + 4 * config.d_inner


def _mamba2_token(config: ModelConfig) -> int:
    """Input, state (2), read-out (2) per state; the input and the skip (2); a head's decay (4)."""
    E, N, H = config.d_inner, config.d_state, config.recurrent_heads
    return 5 * E * N + 2 * E + 4 * H


def _gated_delta_token(config: ModelConfig) -> int:
    """Decay, reading (2), writing (2), read-out (2) per state; the change; a head's decay."""
    V, K, H = config.d_inner, config.d_state, config.recurrent_heads
    return 7 * V * K + V + H


def _mamba2_chunk(config: ModelConfig, c: int) -> int:
    """Matrix products of c tokens (arXiv 2405.21060, section 6).

    C with B, once for all heads; that with x; the states left behind, and those read.
    """
    E, N = config.d_inner, config.d_state
    return 2 * c * c * N + 2 * c * c * E + 4 * c * E * N


def _gated_delta_chunk(config: ModelConfig, c: int) -> int:
    """Matrix products of c tokens (arXiv 2412.06464, section 3.3), and a triangular inverse.

    Keys with keys and with queries; the inverse by substitution, and it with keys and values;
    reading for keys and for queries, values among the chunk's tokens, and writing.
    """
    V, H = config.d_inner, config.recurrent_heads
    K = H * config.d_state
    inverse = H * c * c * (c - 1)
    return 6 * c * c * K + 4 * c * c * V + 6 * c * config.d_state * V + inverse


_PER_TOKEN: dict[RecurrentKind, Callable[[ModelConfig], int]] = {
    RecurrentKind.MAMBA: _mamba_token,
    RecurrentKind.MAMBA2: _mamba2_token,
    RecurrentKind.GATED_DELTA: _gated_delta_token,
}
_PER_CHUNK: dict[RecurrentKind, Callable[[ModelConfig, int], int]] = {
    RecurrentKind.MAMBA2: _mamba2_chunk,
    RecurrentKind.GATED_DELTA: _gated_delta_chunk,
}
