"""What a model costs, by arithmetic on its configuration: parameters, cache bytes, FLOPs.

Nothing is allocated and torch is not needed; the tests hold these numbers against real modules,
real caches and torch's own FLOP counter.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from sambay.spec.layers import LayerKind, LayerSpec, MemorySource, prefill_split
from sambay.spec.model_config import AttentionVariant, ModelConfig, Norm
from sambay.spec.recurrent import GatedMemory, RecurrentKind, conv_channels, state_shape


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """Parameters of one layer: those in matrix products, and all of them.

    `state_matmul` is the share of the mixer's matrix parameters that must run for every token to
    keep the layer's state (all but the output side); it is 0 for layers without state.
    """

    mixer_matmul: int
    state_matmul: int
    mixer: int
    mlp: int
    norms: int

    @property
    def total(self) -> int:
        """All parameters of the layer."""
        return self.mixer + self.mlp + self.norms


class _Mixer(NamedTuple):
    """Parameters of a mixer: in matrix products, those that its state needs, and all others."""

    matmul: int
    state: int
    vectors: int


def layer_cost(config: ModelConfig, layer: LayerSpec) -> LayerCost:
    """The parameter counts of one layer."""
    D = config.hidden_size
    if layer.kind is LayerKind.MAMBA:
        mixer = _RECURRENCES[config.recurrent_kind](config, layer)
    elif layer.kind is LayerKind.GATED_MEMORY:
        normalised = config.gated_memory is GatedMemory.NORMALISED
        weights = config.memory_size if normalised else 0
        mixer = _Mixer(2 * D * config.memory_size, 0, weights)
    else:
        mixer = _attention(config, layer)
    return LayerCost(
        mixer_matmul=mixer.matmul,
        state_matmul=mixer.state,
        mixer=mixer.matmul + mixer.vectors,
        mlp=3 * D * config.intermediate_size,
        norms=2 * D * (2 if config.norm is Norm.LAYER else 1),
    )


def _attention(config: ModelConfig, layer: LayerSpec) -> _Mixer:
    D, q_size = config.hidden_size, config.attention_size
    has_keys = layer.kind is not LayerKind.CROSS
    own_kv = 2 * config.num_kv_heads * config.head_dim if has_keys else 0
    vectors = (q_size + own_kv + D) if config.attention_bias else 0
    if config.attention_variant is AttentionVariant.DIFFERENTIAL:
        vectors += 6 * config.head_dim
    return _Mixer(D * (q_size + own_kv) + q_size * D, D * own_kv, vectors)


def _mamba(config: ModelConfig, layer: LayerSpec) -> _Mixer:
    D, E, R, N = config.hidden_size, config.d_inner, config.dt_rank, config.d_state
    state = 2 * E * D + (R + 2 * N) * E + E * R
    vectors = E * config.d_conv + E + E + E * N + E  # conv, its bias, dt bias, A_log, D
    return _Mixer(state + D * E, state, vectors)


def _mamba2(config: ModelConfig, layer: LayerSpec) -> _Mixer:
    D, E, N, H = config.hidden_size, config.d_inner, config.d_state, config.recurrent_heads
    state = D * (2 * E + 2 * N + H)  # one projection to gate, x, B, C and the time step
    vectors = conv_channels(config) * (config.d_conv + 1) + 3 * H + E  # dt bias, A_log, D; norm
    return _Mixer(state + D * E, state, vectors)


def _gated_delta(config: ModelConfig, layer: LayerSpec) -> _Mixer:
    D, E, H = config.hidden_size, config.d_inner, config.recurrent_heads
    state = D * (conv_channels(config) + 2 * H)  # q, k, v; decay and beta
    publishes = layer.publishes_memory is MemorySource.MAMBA
    before_gate = config.recurrent_norm.is_before_gate(publishes_memory=publishes)
    norm = config.recurrent_head_dim if before_gate else E
    vectors = conv_channels(config) * config.d_conv + 2 * H + norm  # dt bias, A_log
    return _Mixer(state + 2 * D * E, state, vectors)  # and the gate, and the output


_RECURRENCES = {
    RecurrentKind.MAMBA: _mamba,
    RecurrentKind.MAMBA2: _mamba2,
    RecurrentKind.GATED_DELTA: _gated_delta,
}


def parameter_count(config: ModelConfig, *, embeddings: bool = True) -> int:
    """The exact number of parameters; tied embeddings count once, or not at all on request."""
    norm = config.hidden_size * (2 if config.norm is Norm.LAYER else 1)
    table = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    layers = sum(layer_cost(config, layer).total for layer in config.layers)
    return layers + norm + (table if embeddings else 0)


def prefill_share(config: ModelConfig) -> float:
    """The share of the layers' matrix parameters used per prompt token when only the last counts.

    arXiv 2507.06607, section 2: everything behind the last state runs for one token only.
    """
    costs = [layer_cost(config, layer) for layer in config.layers]
    split = prefill_split(config.layers)
    every = sum(cost.mixer_matmul + cost.mlp for cost in costs)
    early = sum(cost.mixer_matmul + cost.mlp for cost in costs[:split])
    return (early + costs[split].state_matmul) / every


def visible_pairs(tokens: int, window: int | None) -> int:
    """The number of (query, key) pairs of a causal map over `tokens` columns."""
    if window is None or window >= tokens:
        return tokens * (tokens + 1) // 2
    return window * (window + 1) // 2 + (tokens - window) * window


def pair_flops(config: ModelConfig) -> int:
    """Floating-point operations per visible pair of columns, in all heads together."""
    if config.attention_variant is AttentionVariant.DIFFERENTIAL:
        return 6 * config.attention_size  # every map weighs values twice as wide
    return 4 * config.attention_size


def forward_flops(config: ModelConfig, tokens: int, *, last_only: bool = False) -> int:
    """Floating-point operations of the matrix products of one row's forward over `tokens`.

    Projections and head (2 per parameter and token) and the visible pairs of attention; elementwise
    work, the convolution and the recurrence are left out; `spec.flops` has the latter two. With
    `last_only` the prefill that returns the logits of the last token.
    """
    split = prefill_split(config.layers) if last_only else config.num_layers
    per_pair = pair_flops(config)
    total = 2 * config.vocab_size * config.hidden_size * (1 if last_only else tokens)
    for layer in config.layers:
        cost = layer_cost(config, layer)
        attends = layer.kind in (LayerKind.SLIDING, LayerKind.FULL, LayerKind.CROSS)
        if layer.index < split:
            total += 2 * tokens * (cost.mixer_matmul + cost.mlp)
            total += per_pair * visible_pairs(tokens, layer.window) if attends else 0
        else:
            state = cost.state_matmul if layer.index == split else 0
            total += 2 * (tokens - 1) * state + 2 * (cost.mixer_matmul + cost.mlp)
            total += per_pair * min(tokens, layer.window or tokens) if attends else 0
    return total


def training_flops(
    config: ModelConfig, tokens: int, *, head: bool = True, attention: bool = True
) -> int:
    """Floating-point operations of the matrix products of learning from one row of `tokens`.

    Three times those of the forward, since the backward multiplies once more for the gradient of
    the inputs and once for that of the weights; what is computed again to save memory does not
    count. Looking up embeddings costs nothing; `head=False` leaves out the head too (a count
    "without embeddings"). `attention=False` leaves out the visible pairs, so that 6 per matrix
    parameter and token remain: for rows whose documents do not see each other, a lower bound.
    """
    costs = [layer_cost(config, layer) for layer in config.layers]
    products = 2 * tokens * sum(cost.mixer_matmul + cost.mlp for cost in costs)
    head_products = 2 * tokens * config.vocab_size * config.hidden_size
    pairs = forward_flops(config, tokens) - products - head_products if attention else 0
    return 3 * (products + pairs + (head_products if head else 0))


def cache_bytes(
    config: ModelConfig, batch_size: int, length: int, *, kv_bytes: int, state_bytes: int = 4
) -> int:
    """The bytes of a cache that holds `length` tokens of `batch_size` rows.

    Full layers keep 2 x kv heads x head_dim values per token, windows at most `window` of them,
    recurrent layers a fixed state (`state_shape`); gated memory units and cross-attention keep
    nothing. `kv_bytes` and `state_bytes` are bytes per value.
    """
    per_token = 2 * config.num_kv_heads * config.head_dim * kv_bytes
    total = 0
    for layer in config.layers:
        if layer.kind is LayerKind.FULL:
            total += length * per_token
        elif layer.kind is LayerKind.SLIDING:
            total += min(layer.window or length, length) * per_token
        elif layer.kind is LayerKind.MAMBA:
            total += state_shape(config).values * state_bytes
    return batch_size * total
