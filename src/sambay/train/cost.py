"""What a run needs, by arithmetic on its configuration: bytes on each device, and time.

Imports no torch, so that a dry run answers at once. The tests hold the activations against the
tensors that torch really keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from sambay.spec.footprint import layer_cost, parameter_count, training_flops
from sambay.spec.layers import LayerKind, LayerSpec
from sambay.spec.model_config import AttentionVariant, ModelConfig, Norm, Position
from sambay.spec.recurrent import GatedMemory, RecurrentKind, conv_channels
from sambay.train.config import ActivationCheckpointing, Precision, RunConfig

_STATE_EVERY = 32  # tokens between the scan states kept for its backward
_CHUNK = 64  # the same of Mamba-2, and the tokens of the delta rule's inverses for long keys
_DELTA_CHUNKS = ((32, 16), (128, 32))  # for keys up to a size
_FLOAT, _NARROW = 4, 2


class Layout(NamedTuple):
    """Processes: copies of the model, the parts each is cut into, and those that share a layer."""

    replicate: int = 1
    shard: int = 1
    tensor: int = 1

    @property
    def devices(self) -> int:
        return self.replicate * self.shard * self.tensor


class MemoryEstimate(NamedTuple):
    """Bytes on one device at the peak of a training step.

    weights, gradients, optimizer: float32, exact; with bf16 in one process also the narrow copies.
    gathered: weights of other devices while they are used, and gradients on their way to them.
    activations: what the layers keep for their backward, and the gradients of the widest block.
    loss: logits of a chunk and the gradient of the output matrix.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return sum(self)


class Kept(NamedTuple):
    """Bytes per token that a block keeps for its backward.

    stream: as wide as the residual stream, the same on all processes that share a layer.
    inner: heads and channels, which they divide.
    """

    stream: int
    inner: int

    def on_one(self, tensor: int) -> int:
        """The bytes on one of the processes that share a layer."""
        return self.stream + self.inner // tensor


def memory_estimate(
    config: RunConfig,
    layout: Layout = Layout(),  # noqa: B008 (immutable)
    recompute: ActivationCheckpointing | None = None,
) -> MemoryEstimate:
    """The memory of one training step on each device.

    `recompute` is the configuration's by default. Libraries and the waste of allocators come on
    top (docs/training.md has what was measured).
    """
    model = config.model
    recompute = recompute or config.activation_checkpointing
    value = _NARROW if config.precision is Precision.BF16 else _FLOAT
    in_blocks = [layer_cost(model, layer) for layer in model.layers]
    matrices = [cost.mixer_matmul + cost.mlp for cost in in_blocks]
    parameters = parameter_count(model)
    others = parameters - sum(matrices)  # embedding, norms, convolutions, SSM parameters
    mine = -(-parameters // (layout.shard * layout.tensor))

    rows = config.batch.global_batch_size // (layout.replicate * layout.shard)
    tokens = min(config.batch.micro_batch_size, max(rows, 1)) * config.data.sequence_length
    copies = gathered = 0
    if layout.devices == 1:
        if value == _NARROW:  # autocast's; those of a block only, where blocks run twice
            none = recompute is ActivationCheckpointing.NONE
            copies = value * (sum(matrices) if none else max(matrices))
    else:
        # FSDP, also where nothing is sharded: two blocks at a time and all that is no matrix.
        # Gradients are added up in float32.
        gathered = max(matrices) * (2 * value + value + _FLOAT) + others * 2 * _FLOAT
        gathered //= layout.tensor
    return MemoryEstimate(
        weights=mine * _FLOAT + copies,
        gradients=mine * _FLOAT,
        optimizer=2 * mine * _FLOAT,
        gathered=gathered,
        activations=tokens * _activations_per_token(config, layout, recompute),
        loss=_loss_bytes(config, layout, tokens),
    )


def training_seconds(config: RunConfig, devices: int, flops_per_second: float) -> float:
    """The time of a whole run if every device achieves this rate of useful work.

    Useful is what `training_flops` counts; computing blocks twice is not. Rows count as one
    document each.
    """
    length = config.data.sequence_length
    tokens = config.num_steps * config.tokens_per_step
    return training_flops(config.model, length) / length * tokens / (devices * flops_per_second)


def checkpoint_bytes(config: RunConfig) -> int:
    """The size of one checkpoint: float32 weights and two moments."""
    return parameter_count(config.model) * 12


def chunk_tokens(vocab_size: int) -> int:
    """The tokens whose logits the loss holds at a time: about 128 MiB of them in float32."""
    return min(max(2**25 // vocab_size, 64), 1024)


def kept_by(config: RunConfig, layer: LayerSpec) -> Kept:
    """What a block keeps when nothing is computed twice; also used where one block is rebuilt."""
    model = config.model
    value = _NARROW if config.precision is Precision.BF16 else _FLOAT
    # Both norms keep their input and, without a mean, the normalised values.
    stream = (4 if model.norm is Norm.RMS else 2) * model.hidden_size * _FLOAT
    # Every projection keeps its input; narrow ones a copy each, and keys have their own.
    has_keys = layer.kind in (LayerKind.SLIDING, LayerKind.FULL)
    stream += (3 if has_keys and value == _NARROW else 2) * model.hidden_size * value
    inner = 4 * model.intermediate_size * value  # gate and value, silu, product
    if layer.kind is LayerKind.MAMBA:
        recurrence = _RECURRENCES[model.recurrent_kind](model, value)
        stream, inner = stream + recurrence.stream, inner + recurrence.inner
    elif layer.kind is LayerKind.GATED_MEMORY:
        inner += 3 * model.memory_size * value  # gate, silu, product
        if model.gated_memory is GatedMemory.NORMALISED:  # in float32: product, normalised
            inner += 2 * model.memory_size * _FLOAT
    else:
        inner += _attention(config, layer, value)
    return Kept(stream, inner)


def products_of(config: RunConfig, layer: LayerSpec) -> Kept:
    """What a block keeps under selective checkpointing: its input, and products and scans."""
    model = config.model
    value = _NARROW if config.precision is Precision.BF16 else _FLOAT
    inner, stream = 2 * model.intermediate_size, 2 * model.hidden_size
    states = 0
    if layer.kind is LayerKind.MAMBA:
        products = _RECURRENT_PRODUCTS[model.recurrent_kind](model)
        stream, inner = stream + products.stream, inner + products.inner
        states = _scan_states(model)
    elif layer.kind is LayerKind.GATED_MEMORY:
        inner += model.memory_size
    else:
        own = 0 if layer.kind is LayerKind.CROSS else 2 * model.num_kv_heads * model.head_dim
        inner += model.attention_size + own
    return Kept(stream * value + model.hidden_size * _FLOAT, inner * value + states)


def _activations_per_token(
    config: RunConfig, layout: Layout, recompute: ActivationCheckpointing
) -> int:
    model, tensor = config.model, layout.tensor
    value = _NARROW if config.precision is Precision.BF16 else _FLOAT
    whole = [kept_by(config, layer).on_one(tensor) for layer in model.layers]
    ends = 2 * model.hidden_size * _FLOAT + model.hidden_size * value  # final norm, input of head
    if recompute is ActivationCheckpointing.NONE:
        return sum(whole) + max(whole) + ends
    if recompute is ActivationCheckpointing.SELECTIVE:
        products = [products_of(config, layer).on_one(tensor) for layer in model.layers]
        rebuilt = max(all_ - some for all_, some in zip(whole, products, strict=True))
        return sum(products) + rebuilt + max(whole) + ends
    inputs = model.num_layers * model.hidden_size * _FLOAT
    shared = 0  # what an earlier block publishes stays until the last reader's backward
    for layer in model.layers:
        if layer.publishes_kv:
            shared += 2 * model.num_kv_heads * model.head_dim
        if layer.publishes_memory is not None:
            shared += model.memory_size
    return inputs + shared * value // tensor + 2 * max(whole) + ends


def _attention(config: RunConfig, layer: LayerSpec, value: int) -> int:
    """Bytes per token inside an attention layer; sequences many blocks long."""
    model, length = config.model, config.data.sequence_length
    heads, keys = model.attention_size, model.num_kv_heads * model.head_dim
    calls = 2 if model.attention_variant is AttentionVariant.DIFFERENTIAL else 1
    window = layer.window if layer.window is not None and layer.window < length else None
    rotated = model.position is Position.ROPE
    masked = 0
    if window is not None:
        band, block = _band(window, length)
        masked = calls * band  # one mask value per query and key
        # Queries and bands of keys are copied per call, differently paired values too.
        kept = calls * heads + heads + calls * 2 * keys * (band // block)
        kept += (heads if rotated else 0) if calls == 1 else 4 * heads
    else:
        own_keys = 0 if layer.kind is LayerKind.CROSS else 2 * keys
        if calls == 1:
            kept = 2 * heads + own_keys
            kept += (heads + own_keys // 2) if rotated else 0
        else:
            kept = 6 * heads + own_keys + 2 * keys  # values once more, paired
        if config.data.separate_documents:  # masks of blocks of queries against what precedes them
            masked = calls * (length + 1) // 2
            kept += heads
    floats = calls * model.num_heads  # log-sum-exp of each query
    if calls == 2:
        floats += 2 * heads + model.num_heads // 2  # the norm of each pair is in float32
    if rotated:
        floats += 2 * model.head_dim
    return (kept + masked) * value + floats * _FLOAT


def _band(window: int, length: int) -> tuple[int, int]:
    """Keys per block of queries, and queries per block, as `sambay.ops.attention` cuts them."""
    block = 1 << max(5, max(window - 1, 1).bit_length() - 1)
    block = min(block, 1 << max(5, (length - 1).bit_length()))
    return -(-(window - 1) // block) * block + block, block


def _mamba(model: ModelConfig, value: int) -> Kept:
    # convolution input, gate, convolution output, time step, scan output, silu, product
    inner = 7 * model.d_inner * value + _scan_states(model)
    return Kept((model.dt_rank + 2 * model.d_state) * value, inner)


def _mamba2(model: ModelConfig, value: int) -> Kept:
    joint = model.d_inner + conv_channels(model) + model.recurrent_heads
    return Kept(
        0,
        # what the first matrix gives, the convolution's output, the input of the last matrix
        (joint + conv_channels(model) + model.d_inner) * value
        + _gated_norm(model, value)
        + _scan_states(model),
    )


def _gated_delta(model: ModelConfig, value: int) -> Kept:
    H, K = model.recurrent_heads, model.recurrent_heads * model.d_state
    wide = 2 * K if value == _NARROW else 0  # keys and queries once more, to be made unit
    # The convolution's input and output, unit keys and queries, the input of the last matrix.
    narrow = 2 * conv_channels(model) + 2 * K + model.d_inner
    # Rates and lengths, seven per head; o, gate, their product and the norm's two values.
    floats = 7 * H + wide + 5 * model.d_inner
    copies = 5 * model.hidden_size * value if value == _NARROW else 0  # for six projections
    return Kept(copies, narrow * value + floats * _FLOAT + _scan_states(model))


def _gated_norm(model: ModelConfig, value: int) -> int:
    """What the norm behind a gate keeps, all in float32: y, silu(z), product, normalised; z."""
    return (4 if value == _FLOAT else 5) * model.d_inner * _FLOAT


_RECURRENCES = {
    RecurrentKind.MAMBA: _mamba,
    RecurrentKind.MAMBA2: _mamba2,
    RecurrentKind.GATED_DELTA: _gated_delta,
}
# Of these the inputs of a convolution and of gates, the time step and the recurrence's output.
_RECURRENT_PRODUCTS: dict[RecurrentKind, Callable[[ModelConfig], Kept]] = {
    RecurrentKind.MAMBA: lambda model: Kept(model.dt_rank + 2 * model.d_state, 4 * model.d_inner),
    RecurrentKind.MAMBA2: lambda model: Kept(
        0, 2 * model.d_inner + conv_channels(model) + model.recurrent_heads
    ),
    RecurrentKind.GATED_DELTA: lambda model: Kept(
        0, 2 * model.d_inner + conv_channels(model) + 2 * model.recurrent_heads
    ),
}


def _scan_states(model: ModelConfig) -> int:
    """Bytes per token of what a recurrence keeps for its backward, float32."""
    E, N = model.d_inner, model.d_state
    if model.recurrent_kind is RecurrentKind.MAMBA:
        return E * N * _FLOAT // _STATE_EVERY
    if model.recurrent_kind is RecurrentKind.MAMBA2:
        return E * N * _FLOAT // _CHUNK
    chunk = next((size for keys, size in _DELTA_CHUNKS if keys >= N), _CHUNK)
    return (E + model.recurrent_heads * chunk) * _FLOAT  # changes and inverses instead of states


def _loss_bytes(config: RunConfig, layout: Layout, tokens: int) -> int:
    model = config.model
    vocabulary = -(-model.vocab_size // layout.tensor)
    logits = min(chunk_tokens(vocabulary), tokens) * vocabulary * _FLOAT
    table = vocabulary * model.hidden_size
    if config.precision is Precision.BF16:  # logits and matrix once more, for the products
        return logits * 3 // 2 + table * (_FLOAT + _NARROW)
    return logits + table * _FLOAT
