"""How positions enter queries and keys: not at all, or by rotation (arXiv 2104.09864)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sambay.layers.context import BatchContext
from sambay.layers.slots import SlotStep
from sambay.ops.decode import rotary_turns, rotate_heads
from sambay.spec import ModelConfig, Position


class NoPosition(nn.Module):
    """Leaves queries and keys as they are; order is known to the recurrent layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    def forward(self, x_BHTP: Tensor, context: BatchContext) -> Tensor:
        """The argument itself."""
        return x_BHTP

    def decode_constants(self, device: torch.device) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def decode(self, x_BHP: Tensor, step: SlotStep, constants: Mapping[str, Tensor]) -> Tensor:
        """The argument itself."""
        return x_BHP


class Rotary(nn.Module):
    """Rotates the halves of each head by angles that grow with the position.

    Angles are float32: in bfloat16 neighbouring positions become equal after a few hundred.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.theta, self.head_dim = config.rope_theta, config.head_dim

    def forward(self, x_BHTP: Tensor, context: BatchContext) -> Tensor:
        """(B, H, T, P) rotated, in the same dtype; T is `context.num_columns`."""
        return _rotated(x_BHTP, *self._turns(context.positions(x_BHTP.device)[:, None, :, None]))

    def decode_constants(self, device: torch.device) -> dict[str, Tensor]:
        """The `frequencies` (P / 2), by which columns are multiplied."""
        return {"frequencies": self._frequencies(device)}

    def decode(self, x_BHP: Tensor, step: SlotStep, constants: Mapping[str, Tensor]) -> Tensor:
        """(B, H, P) rotated, in the same dtype, for one token per slot."""

        def turns() -> tuple[Tensor, Tensor]:
            return rotary_turns(step.columns_B, constants["frequencies"])

        return rotate_heads(x_BHP, *step.once(("turns", self.theta, self.head_dim), turns))

    def _turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, positions (..., 1) to (..., P / 2)."""
        angles = positions.float() * self._frequencies(positions.device)
        return angles.cos(), angles.sin()

    def _frequencies(self, device: torch.device) -> Tensor:
        half = torch.arange(self.head_dim // 2, device=device, dtype=torch.float32)
        return self.theta ** (-2 * half / self.head_dim)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


_CLASSES = {Position.NONE: NoPosition, Position.ROPE: Rotary}


def make_position(config: ModelConfig) -> NoPosition | Rotary:
    """The configured treatment of positions."""
    return _CLASSES[config.position](config)
