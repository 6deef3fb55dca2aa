"""What a run will do and need, worked out from its configuration without making the model.

Imports no torch, so `--dry-run` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from sambay.spec.footprint import parameter_count
from sambay.spec.layers import LayerKind, LayerSpec
from sambay.spec.model_config import ModelConfig
from sambay.train.config import (
    DEFAULT_DECAY_FRACTION,
    ActivationCheckpointing,
    Precision,
    RunConfig,
    ScheduleKind,
)

_STATE_EVERY = 32  # tokens between the scan states kept for its backward


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes a training step holds at its peak; all but the last are exact."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def memory_estimate(config: RunConfig) -> MemoryEstimate:
    """The memory of one training step.

    Weights, gradients and both moments of AdamW are float32; bf16 adds a copy of the weights.
    Activations are what the layers keep for their backward, counted tensor by tensor, for one
    micro-batch (with activation checkpointing: the inputs of all blocks and one whole block), the
    gradients of the widest block, and the loss. Libraries and the allocator's waste come on top;
    peaks measured on the CPU were 5 to 20 % above the total.
    """
    parameters = parameter_count(config.model)
    is_bf16 = config.precision is Precision.BF16
    tokens = config.batch.micro_batch_size * config.data.sequence_length
    model = config.model
    blocks = [_block_bytes(model, layer, 2 if is_bf16 else 4) for layer in model.layers]
    if config.activation_checkpointing is not ActivationCheckpointing.NONE:
        per_token = model.num_layers * model.hidden_size * 4 + 2 * max(blocks)
    else:
        per_token = sum(blocks) + max(blocks)
    loss_chunk = min(chunk_tokens(model.vocab_size), tokens) * model.vocab_size
    loss_chunk *= 6 if is_bf16 else 4  # logits in float32, and in bf16 for the products
    table = model.vocab_size * model.hidden_size * 4
    activations = tokens * (per_token + 2 * model.hidden_size * 4) + loss_chunk + table
    return MemoryEstimate(
        weights=parameters * (6 if is_bf16 else 4),
        gradients=parameters * 4,
        optimizer=parameters * 8,
        activations=activations,
    )


def checkpoint_bytes(config: RunConfig) -> int:
    """The size of one checkpoint: float32 weights and two moments."""
    return parameter_count(config.model) * 12


def without_effect(config: RunConfig) -> list[str]:
    """Fields that were set although nothing reads them in this combination, one line each."""
    schedule = config.schedule
    lines = []
    if schedule.kind is not ScheduleKind.WSD and schedule.decay_fraction != DEFAULT_DECAY_FRACTION:
        lines.append(f"schedule.decay_fraction has no effect with kind={schedule.kind.value}")
    if schedule.kind is ScheduleKind.CONSTANT and schedule.minimum_factor != 0:
        lines.append("schedule.minimum_factor has no effect with kind=constant")
    has_cross = any(layer.kind is LayerKind.CROSS for layer in config.model.layers)
    for decoder in ("self", "cross"):
        name = f"regularisation.{decoder}_decoder_from_step"
        start = getattr(config.regularisation, f"{decoder}_decoder_from_step")
        if not start:  # the default, or never, which is true in any case
            continue
        if config.regularisation.attention_dropout == 0:
            lines.append(f"{name} has no effect with attention_dropout=0")
        elif decoder == "cross" and not has_cross:
            lines.append(f"{name} has no effect on a model without cross-attention")
        elif start >= config.num_steps:
            lines.append(f"{name} = {start} is never reached: the run has {config.num_steps} steps")
    return lines


def describe(config: RunConfig) -> list[tuple[str, str]]:
    """What a person wants to know before starting, as (topic, text) lines."""
    model, batch, schedule = config.model, config.batch, config.schedule
    parameters = parameter_count(model)
    tokens = config.num_steps * config.tokens_per_step
    optimizer = config.optimizer
    memory = memory_estimate(config)
    width = f"hidden {model.hidden_size}, {model.num_heads}/{model.num_kv_heads} heads"
    window = "" if model.window is None else f", window {model.window}"
    factor = optimizer.matrix_learning_rate_factor
    matrices = "" if factor == 1 else f" (matrices x {factor:g})"
    return [
        ("architecture", f"{model.layer_pattern}"),
        (
            "model",
            f"{model.num_layers} layers, {width} of {model.head_dim}{window}, "
            f"vocabulary {model.vocab_size:,}",
        ),
        (
            "parameters",
            f"{parameters:,} ({parameter_count(model, embeddings=False):,} without embeddings)",
        ),
        (
            "batch",
            f"{batch.global_batch_size} x {config.data.sequence_length} = "
            f"{config.tokens_per_step:,} tokens per step, in micro-batches of "
            f"{batch.micro_batch_size}, {config.precision.value}",
        ),
        (
            "length",
            f"{config.num_steps:,} steps, {tokens:,} tokens, "
            f"{tokens / parameters:.3g} tokens per parameter",
        ),
        (
            "optimiser",
            f"AdamW, peak learning rate {optimizer.peak_learning_rate:g}{matrices}, "
            f"{schedule.kind.value} schedule, warm-up {schedule.warmup_tokens:,} tokens, "
            f"weight decay {optimizer.weight_decay:g}, clipping {optimizer.clip_norm:g}",
        ),
        (
            "memory",
            f"about {size_text(memory.total)}: weights {size_text(memory.weights)}, gradients "
            f"{size_text(memory.gradients)}, optimiser {size_text(memory.optimizer)}, "
            f"activations about {size_text(memory.activations)}",
        ),
        (
            "disk",
            f"{size_text(checkpoint_bytes(config))} per checkpoint, every "
            f"{config.checkpoint.every_steps} steps, the last {config.checkpoint.keep} kept",
        ),
    ]


def chunk_tokens(vocab_size: int) -> int:
    """The tokens whose logits the loss holds at a time: about 128 MiB of them in float32."""
    return min(max(2**25 // vocab_size, 64), 1024)


def _block_bytes(model: ModelConfig, layer: LayerSpec, value_bytes: int) -> int:
    """Bytes per token that a block keeps for its backward; the residual stream stays float32."""
    heads, keys = model.attention_size, 2 * model.num_kv_heads * model.head_dim
    states = 0
    if layer.kind is LayerKind.MAMBA:
        # convolution input, gate, convolution output, time step, scan output, silu, product
        mixer = 7 * model.d_inner + model.dt_rank + 2 * model.d_state
        states = model.d_inner * model.d_state // _STATE_EVERY
    elif layer.kind is LayerKind.GATED_MEMORY:
        mixer = 3 * model.memory_size  # gate, silu, product
    else:
        mixer = 3 * heads + (0 if layer.kind is LayerKind.CROSS else 2 * keys)
    # Two norms keep their input, twice, and their output; the MLP gate, value, silu and product.
    values = 2 * model.hidden_size + mixer + 4 * model.intermediate_size
    return values * value_bytes + (4 * model.hidden_size + states) * 4


def size_text(count: int) -> str:
    """A number of bytes for people: 74 MB, 1.50 GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
