"""What a run will do and need, as text, worked out from its configuration alone.

Imports no torch, so `--dry-run` answers at once.
"""

from __future__ import annotations

from collections.abc import Iterable

from sambay.errors import ConfigError
from sambay.spec.footprint import parameter_count
from sambay.spec.layers import LayerKind
from sambay.train.config import (
    DEFAULT_DECAY_FRACTION,
    ActivationCheckpointing,
    RunConfig,
    ScheduleKind,
)
from sambay.train.cost import Layout, checkpoint_bytes, memory_estimate, training_seconds
from sambay.train.layout import sizes_for

A100_PEAK = 312e12  # dense bfloat16 products per second
# The published 14 days on 1,024 of them for Phi4-mini-Flash come to 0.32.
ASSUMED_SHARE = 0.30


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
    model, batch = config.model, config.batch
    parameters = parameter_count(model)
    tokens = config.num_steps * config.tokens_per_step
    width = f"hidden {model.hidden_size}, {model.num_heads}/{model.num_kv_heads} heads"
    window = "" if model.window is None else f", window {model.window}"
    memory, keep_every = memory_estimate(config), config.checkpoint.keep_every_steps
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
            f"{_digits(tokens / parameters)} tokens per parameter",
        ),
        *_learning(config),
        (
            "memory",
            f"about {size_text(memory.total)} in one process: weights {size_text(memory.weights)}, "
            f"gradients {size_text(memory.gradients)}, optimiser {size_text(memory.optimizer)}, "
            f"activations about {size_text(memory.activations)} (checkpointing: "
            f"{config.activation_checkpointing.value}), loss {size_text(memory.loss)}",
        ),
        (
            "disk",
            f"{size_text(checkpoint_bytes(config))} per checkpoint, every "
            f"{config.checkpoint.every_steps} steps, the last {config.checkpoint.keep} kept"
            + (f", every {keep_every}-th step's for good" if keep_every else ""),
        ),
    ]


def _learning(config: RunConfig) -> list[tuple[str, str]]:
    optimizer, schedule, regularisation = (
        config.optimizer, config.schedule, config.regularisation
    )  # fmt: skip
    peak, factor = optimizer.peak_learning_rate, optimizer.matrix_learning_rate_factor
    lines = [
        (
            "optimiser",
            f"AdamW, {schedule.kind.value} schedule, warm-up {schedule.warmup_tokens:,} tokens, "
            f"clipping {optimizer.clip_norm:g}, weight decay {optimizer.weight_decay:g} of "
            f"matrices and {optimizer.vector_weight_decay:g} of all others, first weights "
            f"{config.init_scheme.value}",
        ),
        (
            "learning rate",
            f"{peak * factor:.4g} at its peak for matrices, {peak:.4g} for all others (embeddings, "
            "head, norms, biases, convolutions, SSM parameters)",
        ),
    ]
    terms = []
    if regularisation.label_smoothing:
        terms.append(f"label smoothing {regularisation.label_smoothing:g}")
    if regularisation.z_loss:
        terms.append(f"z-loss {regularisation.z_loss:g}")
    if regularisation.attention_dropout:
        starts = {
            "self-decoder": regularisation.self_decoder_from_step,
            "cross-decoder": regularisation.cross_decoder_from_step,
        }
        where = [f"{name} from step {at:,}" for name, at in starts.items() if at is not None]
        terms.append(f"attention dropout {regularisation.attention_dropout:g}: {', '.join(where)}")
    return [*lines, ("loss", ", ".join(["cross-entropy", *terms]))]


def outlook(
    config: RunConfig, devices: Iterable[int], flops_per_second: float | None = None
) -> list[str]:
    """A table of memory and time by the number of devices, as lines.

    `flops_per_second`: of useful work per device; by default an assumption, which is said.

    Raises:
        ConfigError: no devices, or no speed.
    """
    devices = tuple(devices)
    if not devices or min(devices) < 1:
        raise ConfigError(f"--devices = {','.join(map(str, devices))}; each must be 1 or more")
    if flops_per_second is not None and flops_per_second <= 0:
        raise ConfigError(f"--flops = {flops_per_second:g}; it must be greater than 0")
    assumed = flops_per_second is None
    rate = ASSUMED_SHARE * (config.logging.peak_flops or A100_PEAK)
    rate = rate if flops_per_second is None else flops_per_second
    chosen = config.activation_checkpointing
    lines = [
        "per device in GB; activations of a micro-batch by what is checkpointed; "
        f"total with '{chosen.value}'",
        "  devices  layout         weights  gradients  optimiser  gathered  "
        "none / selective / full      loss  total     hours",
    ]
    for count in devices:
        lines.append(f"  {count:<7,}  {_row(config, count, rate)}")
    why = (
        f"an assumption ({ASSUMED_SHARE:.0%} of "
        + ("logging.peak_flops" if config.logging.peak_flops else "an A100's 312 TFLOP/s in bf16")
        + "; --flops states another)"
        if assumed
        else "as stated"
    )
    lines.append(
        f"  layout: replicas x shards x tensor. hours: at {rate / 1e12:.4g} TFLOP/s of useful work "
        f"per device, {why}; work done twice to save memory, evaluation and saving come on top"
        + ("; rows count as one document each" if config.data.separate_documents else "")
    )
    return lines


def _row(config: RunConfig, devices: int, rate: float) -> str:
    try:
        layout = Layout(*sizes_for(config, devices))
    except ConfigError as error:
        return f"not possible: {str(error).partition(';')[0]}"
    by_mode = {
        mode: memory_estimate(config, layout, mode).activations for mode in ActivationCheckpointing
    }
    memory = memory_estimate(config, layout)
    activations = " / ".join(_gigabytes(amount) for amount in by_mode.values())
    hours = training_seconds(config, devices, rate) / 3600
    return (
        f"{' x '.join(map(str, layout)):<13}  {_gigabytes(memory.weights):<7}  "
        f"{_gigabytes(memory.gradients):<9}  {_gigabytes(memory.optimizer):<9}  "
        f"{_gigabytes(memory.gathered):<8}  {activations:<27}  {_gigabytes(memory.loss):<4}  "
        f"{_gigabytes(memory.total):<8}  {_digits(hours)}"
    )


def _gigabytes(amount: int) -> str:
    return _digits(amount / 1e9) if amount >= 1e6 else "0"


def _digits(value: float) -> str:
    """At least three digits, and no exponent where they are enough."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def size_text(count: int) -> str:
    """A number of bytes for people: 74 MB, 1.50 GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
