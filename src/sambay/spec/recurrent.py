"""Which recurrence the letter M stands for, where its norm sits, and how large it is."""

from __future__ import annotations

import enum
import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sambay.spec.model_config import ModelConfig


class RecurrentKind(enum.StrEnum):
    """The recurrent mixer of every M layer; one kind per model."""

    MAMBA = "mamba"  # Mamba-1, arXiv 2312.00752: a state per channel, decay per channel and state
    MAMBA2 = "mamba2"  # SSD, arXiv 2405.21060: a matrix per head, one decay per head and token
    GATED_DELTA = "gated_delta"  # Gated DeltaNet, arXiv 2412.06464: the delta rule with decay


class RecurrentNorm(enum.StrEnum):
    """Where Mamba-2 and Gated DeltaNet normalise what they read from their state.

    After the gate is what makes a normalised gated memory unit re-weight the token mixing
    (arXiv 2507.06607, appendix B); the others are the ablations of its table 9. Mamba-1 has no
    such norm.
    """

    AFTER_GATE = "after_gate"  # RMSNorm(y * silu(z)) over the whole width
    BEFORE_GATE = "before_gate"  # RMSNorm(y) * silu(z); Gated DeltaNet: within each head
    BEFORE_GATE_IN_PUBLISHER = "before_gate_in_publisher"  # only where the memory comes from

    def is_before_gate(self, *, publishes_memory: bool) -> bool:
        """Whether a layer that does or does not publish its readout as memory norms it first."""
        if self is RecurrentNorm.BEFORE_GATE_IN_PUBLISHER:
            return publishes_memory
        return self is RecurrentNorm.BEFORE_GATE


class GatedMemory(enum.StrEnum):
    """How gated memory units use the memory (arXiv 2507.06607, section 2)."""

    PLAIN = "plain"  # the gated memory itself
    NORMALISED = "normalised"  # RMSNorm of the gated memory, over its whole width


class StateShape(NamedTuple):
    """What a recurrent layer keeps per row between tokens.

    conv: (d_conv - 1, channels), the last inputs of its short convolution.
    ssm: (E, N) of Mamba, (H, P, N) of Mamba-2, (H, K, V) of Gated DeltaNet.
    """

    conv: tuple[int, int]
    ssm: tuple[int, ...]

    @property
    def values(self) -> int:
        """The number of values in both."""
        return math.prod(self.conv) + math.prod(self.ssm)


def conv_channels(config: ModelConfig) -> int:
    """The channels of the short convolution: x of Mamba; x, B and C of Mamba-2; q, k and v."""
    return (
        config.d_inner
        + {
            RecurrentKind.MAMBA: 0,
            RecurrentKind.MAMBA2: 2 * config.d_state,
            RecurrentKind.GATED_DELTA: 2 * config.recurrent_heads * config.d_state,
        }[config.recurrent_kind]
    )


def state_shape(config: ModelConfig) -> StateShape:
    """The state of every recurrent layer of a model."""
    heads, head_dim = config.recurrent_heads, config.recurrent_head_dim
    ssm = {
        RecurrentKind.MAMBA: (config.d_inner, config.d_state),
        RecurrentKind.MAMBA2: (heads, head_dim, config.d_state),
        RecurrentKind.GATED_DELTA: (heads, config.d_state, head_dim),
    }
    conv = (config.d_conv - 1, conv_channels(config))
    return StateShape(conv, ssm[config.recurrent_kind])


def published_sizes(
    kind: RecurrentKind,
    hidden_size: int,
    *,
    expand: int = 2,
    d_state: int | None = None,
    head_dim: int | None = None,
) -> dict[str, int]:
    """The state size, heads and head size that a recurrence has at a hidden size, as fields.

    Mamba-2: heads of 64 with a state of 128, in groups of 8 heads that reach `expand` x hidden
    size. Gated DeltaNet: keys of 256 that reach 3/4 of the hidden size, values twice as wide
    (released configurations of arXiv 2507.06607). Given sizes replace the published ones, and the
    number of heads follows them.
    """
    if kind is RecurrentKind.MAMBA:
        return {} if d_state is None else {"d_state": d_state}
    if kind is RecurrentKind.MAMBA2:
        d_state, head_dim = d_state or 128, head_dim or 64
        heads = 8 * math.ceil(expand * hidden_size / (8 * head_dim))
    else:
        d_state = d_state or 256
        head_dim = head_dim or 2 * d_state
        heads = math.ceil(math.floor(0.75 * hidden_size) / d_state)
    return {"d_state": d_state, "recurrent_heads": heads, "recurrent_head_dim": head_dim}
