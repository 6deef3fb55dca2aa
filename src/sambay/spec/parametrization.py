"""The scaling rules a model's stored numbers and first weights come from."""

from __future__ import annotations

import enum
import math

from sambay.errors import ConfigError, nearest

BASE_DEPTH = 16  # the depth at which muP++ multipliers equal those of the tuned base model
BASE_HEAD_DIM = 128


class Parametrization(enum.StrEnum):
    """Where the stored multipliers come from (arXiv 2507.06607, table 6)."""

    STANDARD = "standard"
    MUP = "mup"
    MUP_PLUS_PLUS = "mup++"

    @classmethod
    def _missing_(cls, value: object) -> Parametrization:
        hint = nearest(str(value), [member.value for member in cls])
        raise ConfigError(f"parametrization '{value}' does not exist{hint}")

    def multipliers(self, depth: int, head_dim: int) -> dict[str, float]:
        """The residual, logit and attention multipliers at a depth and head size."""
        if self is Parametrization.STANDARD:
            return {"attention_scale": 1 / math.sqrt(head_dim)}
        residual = 1 / math.sqrt(2 * depth) if self is Parametrization.MUP_PLUS_PLUS else 1.0
        return {
            "residual_multiplier": residual,
            "logit_multiplier": BASE_DEPTH / depth,
            "attention_scale": math.sqrt(BASE_HEAD_DIM) / head_dim,
        }


class InitScheme(enum.StrEnum):
    """How first weights are drawn; the table is in `sambay.model.init`.

    "Published" is table 6 of arXiv 2507.06607; the released code also divides the matrices that
    write to the residual stream of tied models, which the published losses were trained with.
    """

    STANDARD = "standard"
    MUP_PUBLISHED = "mup_published"
    MUP_RELEASED = "mup_released"

    @classmethod
    def _missing_(cls, value: object) -> InitScheme:
        hint = nearest(str(value), [member.value for member in cls])
        raise ConfigError(f"init scheme '{value}' does not exist{hint}")
