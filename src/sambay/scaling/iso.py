"""Hidden sizes at which models of one depth have equally many parameters (no torch).

Two ways: the published formulas (arXiv 2507.06607, section 3.1 and appendix C), which count only
large matrices of an idealised stack, and a search over the exact counts of the real models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from sambay.errors import ConfigError, nearest
from sambay.spec import MemorySource, ModelConfig, Parametrization, presets
from sambay.spec.footprint import parameter_count
from sambay.spec.parametrization import BASE_HEAD_DIM

REFERENCE = "transformer++"  # what every architecture is made as large as
BASE_ASPECT_RATIO = 128  # of the reference: hidden size per layer

# The published sizes count every model as if it repeated one unit of four layers; the models
# themselves shift one layer from the cross-decoder to the self-decoder. F stands for attention
# with keys of its own, windowed or not.
UNITS = {
    "transformer++": "FFFF",
    "transformer-ls": "FFFF",
    "samba": "FFMM",
    "samba+yoco": "FCCM",
    "swa+yoco": "FFCC",
    "sambay": "FCMG",
    "sambay+da": "FCMG",
    "sambay-2": "FCMG",
    "sambay-2+nb": "FCMG",
    "s-gdny": "FCMG",
    "s-gdny+gdn": "FCMG",
    "mambay": "MMCG",
    "mambay-2": "MMCG",
    "mambay-2+nb": "MMCG",
    "gdny": "MMCG",
    "gdny+gdn": "MMCG",
    "sambay-a": "FCMG",
    "sambay-aa": "FMGG",
    "sambay-mlp": "FCMG",
}
# Published although the rule gives another value: 120.80 would be rounded up to 122.
EXCEPTIONS = {"gdny": 120, "gdny+gdn": 120}
# What the reference takes over from the model that is made as large; the rest is its own.
_SHARED_FIELDS = frozenset({
    "vocab_size", "num_heads", "num_kv_heads", "head_dim", "tie_embeddings", "norm",
    "attention_bias",
})  # fmt: skip


@dataclass(frozen=True)
class AspectRatio:
    """The root of c2 a^2 + c1 a = target, in which N = (c2 a^2 + c1 a) depth^3.

    `rounded` is the root rounded up to an even number, the published rule; `published` is what the
    models of the paper have, which is `rounded` but for `EXCEPTIONS`.
    """

    architecture: str
    c2: float
    c1: float
    root: float
    rounded: int
    published: int


@dataclass(frozen=True)
class Size:
    """A model and how far its count is from what was asked for."""

    config: ModelConfig
    parameters: int
    target: int

    @property
    def hidden_size(self) -> int:
        """The width that was found."""
        return self.config.hidden_size

    @property
    def deviation(self) -> float:
        """The relative difference to the target, for example 0.001."""
        return self.parameters / self.target - 1


def coefficients(architecture: str) -> tuple[Fraction, Fraction]:
    """Parameters of a layer of the unit on average, in hidden_size^2 and hidden_size x attention.

    "Attention" is the width of all query heads, of which there are four to a key head. Convolution,
    time step, norms and lambdas do not count.

    Raises:
        ConfigError: an architecture without a published composition.
    """
    if architecture not in UNITS:
        raise ConfigError(f"architecture '{architecture}' does not exist"
                          f"{nearest(architecture, UNITS)}")  # fmt: skip
    fields = presets.PRESETS[architecture].fields
    is_delta = fields.get("recurrent_kind", "mamba") == "gated_delta"
    inner = Fraction(3, 2) if is_delta else Fraction(2)  # of the recurrent mixer, in hidden sizes
    memory = {
        MemorySource.MAMBA: (inner, Fraction(0)),
        MemorySource.ATTENTION: (Fraction(0), Fraction(1)),
        MemorySource.MLP: (Fraction(4), Fraction(0)),
    }[MemorySource(fields.get("memory_source", "mamba"))]
    mixers = {
        "F": (Fraction(0), 2 + Fraction(2, 4)),  # queries and output; keys and values of a quarter
        "C": (Fraction(0), Fraction(2)),
        # In, gate and out; the delta rule has keys and queries of half its inner width besides.
        "M": (inner * (4 if is_delta else 3), Fraction(0)),
        "G": (2 * memory[0], 2 * memory[1]),
    }
    unit = [mixers[letter] for letter in UNITS[architecture]]
    none = Fraction(0)
    mlp = 3 * 4
    return (
        mlp + sum((one[0] for one in unit), none) / 4,
        sum((one[1] for one in unit), none) / 4,
    )


def nominal_parameters(architecture: str, depth: int) -> int:
    """The published count of parameters without embeddings, which sets the tokens of a run.

    It is a formula: equal parts of each kind of layer, and only the large matrices. The exact
    count, `footprint.parameter_count`, differs by -0.3 to 5 %.

    Raises:
        ConfigError: an unknown architecture, or a depth it cannot have.
    """
    squared, attention = coefficients(architecture)
    config = presets.build(architecture, depth)
    width = config.hidden_size
    count = depth * (squared * width**2 + attention * width * config.attention_size)
    assert count.denominator == 1, "four layers have a whole number of parameters"
    return int(count)


def aspect_ratio(
    architecture: str, base: int = BASE_ASPECT_RATIO, head_dim: int = BASE_HEAD_DIM
) -> AspectRatio:
    """The hidden size per layer that makes an architecture as large as a Transformer++ of `base`.

    By the published formulas, with `depth` query heads of `head_dim` in both; it is the same at
    every depth.

    Raises:
        ConfigError: an unknown architecture, or sizes below 1.
    """
    if base < 1 or head_dim < 1:
        raise ConfigError(f"base = {base}, head_dim = {head_dim}; both must be 1 or more")

    def terms(name: str) -> tuple[Fraction, Fraction]:
        squared, attention = coefficients(name)
        return squared, attention * head_dim

    c2, c1 = terms(REFERENCE)
    target = c2 * base**2 + c1 * base
    c2, c1 = terms(architecture)
    root = (math.sqrt(c1**2 + 4 * c2 * target) - c1) / (2 * c2)
    # In whole numbers, since a root of 128 may come out as 128.00000000000003.
    rounded = 2 * max(1, math.floor(root / 2))
    while c2 * rounded**2 + c1 * rounded < target:
        rounded += 2
    published = presets.PRESETS[architecture].aspect_ratio
    return AspectRatio(architecture, float(c2), float(c1), float(root), rounded, published)


def nearest_size(
    build: Callable[[int], ModelConfig],
    target: int,
    *,
    multiple: int = 2,
    embeddings: bool = False,
) -> Size:
    """The model whose exact count is nearest to `target`; of two equally near ones the smaller.

    `build` makes a configuration from a hidden size and must not shrink with it; hidden sizes are
    multiples of `multiple`. `embeddings` says whether both counts include them.

    Raises:
        ConfigError: no such model is as small as the target; or what `build` raises.
    """
    if multiple < 2:
        raise ConfigError(f"multiple = {multiple}; hidden sizes are multiples of 2 or more")

    def size(steps: int) -> Size:
        config = build(steps * multiple)
        return Size(config, parameter_count(config, embeddings=embeddings), target)

    low, high = size(1), size(2)
    if low.parameters > target:
        raise ConfigError(
            f"{target:,} parameters are fewer than the smallest model has, which is "
            f"{low.parameters:,} at a hidden size of {multiple}; ask for more, or shrink what does "
            "not grow with the hidden size: heads, head_dim, d_state, vocabulary"
        )
    below, above = 1, 2
    while high.parameters < target:
        below, low, above = above, high, 2 * above
        high = size(above)
    while above - below > 1:
        middle = (below + above) // 2
        found = size(middle)
        if found.parameters < target:
            below, low = middle, found
        else:
            above, high = middle, found
    return min(low, high, key=lambda one: abs(one.parameters - target))


def same_size_by_mlp(config: ModelConfig, target: int, *, embeddings: bool = False) -> ModelConfig:
    """The configuration with the size of its MLPs chosen so that its exact count is `target`.

    For models too small to be matched by their hidden size, of which one step is then several per
    cent of the parameters.

    Raises:
        ConfigError: without MLPs worth the name the model is larger than the target already.
    """
    counts = [
        parameter_count(config.replace(intermediate_size=size), embeddings=embeddings)
        for size in (1, 2)
    ]
    size = 1 + round((target - counts[0]) / (counts[1] - counts[0]))
    if size < 1:
        raise ConfigError(
            f"{target:,} parameters are fewer than the {counts[0]:,} of the mixers alone; ask for "
            "more, or make the model narrower"
        )
    return config.replace(intermediate_size=size)


def same_size(
    architecture: str,
    depth: int,
    *,
    target: int | None = None,
    base_aspect_ratio: int = BASE_ASPECT_RATIO,
    multiple: int = 2,
    embeddings: bool = False,
    parametrization: Parametrization | str = Parametrization.MUP_PLUS_PLUS,
    **fields: Any,
) -> Size:
    """The member of the family with as many parameters as a Transformer++ of its depth has.

    `target` is a count to reach instead. `fields` are those of `presets.build`; one that changes
    with depth may be a function of it: `num_heads=lambda depth: depth // 2`. Vocabulary, heads and
    norm hold for the Transformer++ too.

    Raises:
        ConfigError: an architecture that does not exist or cannot be built at this depth (says
            why), or a target below the smallest model.
    """
    given: dict[str, Any] = {
        name: value(depth) if callable(value) else value for name, value in fields.items()
    }
    if "hidden_size" in given:
        raise ConfigError("hidden_size is what is looked for; leave it out")

    def build(hidden_size: int) -> ModelConfig:
        return presets.build(
            architecture, depth, parametrization=parametrization, hidden_size=hidden_size, **given
        )

    presets.build(architecture, depth, parametrization=parametrization, **given)  # may refuse
    if target is None:
        shared = {name: value for name, value in given.items() if name in _SHARED_FIELDS}
        reference = presets.build(REFERENCE, depth, hidden_size=base_aspect_ratio * depth, **shared)
        target = parameter_count(reference, embeddings=embeddings)
    return nearest_size(build, target, multiple=multiple, embeddings=embeddings)
