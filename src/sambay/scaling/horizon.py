"""Tokens and learning rates of the published runs as functions of depth (no torch).

Source: arXiv 2507.06607, section 3.1, appendix C and tables 6 and 7.
"""

from __future__ import annotations

import math

from sambay.errors import ConfigError, nearest
from sambay.spec import Parametrization, presets
from sambay.spec.model_config import ModelConfig
from sambay.spec.parametrization import BASE_DEPTH

BASE_TOKENS = 100_000_000_000  # of the Transformer++ at the base depth
BASE_BATCH_TOKENS = 2**21
BASE_LEARNING_RATE = 4e-4  # tuned at the base depth and batch
WARMUP_TOKENS = 1_000_000_000

# The published sizes count every model as if it repeated one unit of four layers; the models
# themselves shift one layer from the cross-decoder to the self-decoder.
_UNITS = {
    "transformer++": "FFFF",
    "transformer-ls": "FFFF",
    "samba": "FFMM",
    "samba+yoco": "FCCM",
    "swa+yoco": "FFCC",
    "sambay": "FCMG",
    "sambay+da": "FCMG",
    "mambay": "MMCG",
    "sambay-a": "FCMG",
    "sambay-aa": "FMGG",
    "sambay-mlp": "FCMG",
}


def nominal_parameters(architecture: str, depth: int) -> int:
    """The published count of parameters without embeddings, which sets the tokens of a run.

    It is a formula: equal parts of each kind of layer, and only the large matrices. The exact
    count, `footprint.parameter_count`, differs by -0.3 to 5 %.

    Raises:
        ConfigError: an unknown architecture, or a depth it cannot have.
    """
    if architecture not in _UNITS:
        raise ConfigError(f"architecture '{architecture}' does not exist"
                          f"{nearest(architecture, _UNITS)}")  # fmt: skip
    config = presets.build(architecture, depth)
    return depth // 4 * sum(_layer(config, kind) for kind in _UNITS[architecture])


def token_budget(architecture: str, depth: int) -> int:
    """The tokens of a run of the FLOPs ladder, in proportion to the parameters.

    About 103 per nominal parameter: T = T0 N(depth) / N0, with N0 the Transformer++ at the base
    depth for every architecture.
    """
    base = nominal_parameters("transformer++", BASE_DEPTH)
    return BASE_TOKENS * nominal_parameters(architecture, depth) // base


def peak_learning_rate(
    depth: int,
    batch_tokens: int = BASE_BATCH_TOKENS,
    parametrization: Parametrization = Parametrization.MUP_PLUS_PLUS,
) -> float:
    """The rate of vector-like parameters: with the root of the batch, under muP++ 1/root(depth)."""
    rate = BASE_LEARNING_RATE * math.sqrt(batch_tokens / BASE_BATCH_TOKENS)
    if parametrization is Parametrization.MUP_PLUS_PLUS:
        rate *= math.sqrt(BASE_DEPTH / depth)
    return rate


def matrix_learning_rate_factor(
    depth: int, parametrization: Parametrization = Parametrization.MUP_PLUS_PLUS
) -> float:
    """What the rate of matrix-like parameters is multiplied by: d0/d, as width grows with depth."""
    return 1.0 if parametrization is Parametrization.STANDARD else BASE_DEPTH / depth


def _layer(config: ModelConfig, kind: str) -> int:
    width, heads = config.hidden_size, config.attention_size
    own_kv = 2 * config.num_kv_heads * config.head_dim
    mixer = {
        "F": 2 * width * heads + width * own_kv,
        "C": 2 * width * heads,
        "M": 3 * width * config.d_inner,
        "G": 2 * width * config.memory_size,
    }[kind]
    return mixer + 3 * width * config.intermediate_size
