"""What the tensors of an ArchScale checkpoint tell about its model, and what must be given.

Sources of shapes and settings: the released code of arXiv 2507.06607.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sambay.errors import CheckpointMismatch, ConfigError
from sambay.spec import MemorySource, ModelConfig, Parametrization, format_pattern, parse_pattern

LAYER = "transformer.h.{}."
EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"
_NORM_EPS = 1e-5  # a constant of the released code
_LONG_ROPE_BASE = 640_000  # of its runs at 32,768 tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What an ArchScale checkpoint does not store; None where nothing was given.

    layer_pattern: needed only where shapes cannot tell windowed from full attention.
    rope_base: 0 for no positions, which hybrids of Mamba and cross-decoder have unless told.
    head_dim, num_heads, num_kv_heads: one of them is enough, and none with differential attention.
    memory_source: needed only where the widths of two possible sources are equal.
    """

    parametrization: str | None = None
    tied: bool | None = None
    window: int | None = None
    rope_base: float | None = None
    head_dim: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    layer_pattern: str | None = None
    memory_source: str | None = None


def suggestions(path: Path) -> dict[str, Any]:
    """What the name of the run suggests for the fields of `Settings`; nothing more than a hint."""
    name = f"_{path.parent.name}_{path.stem}_"
    found: dict[str, Any] = {"parametrization": "standard"}
    if "_mup_" in name:
        found["parametrization"] = "mup" if "_ori_mup_" in name else "mup++"
    if match := re.search(r"_swa(\d+)", name):
        found["window"] = int(match[1])
    if "_rbase_" in name:
        found["rope_base"] = _LONG_ROPE_BASE
    return found


class Shapes:
    """What the tensors of one file tell about its model."""

    def __init__(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        self.tensors, self.path = tensors, path
        indices = {
            int(m[1]) for name in tensors if (m := re.match(r"transformer\.h\.(\d+)\.", name))
        }
        if indices != set(range(len(indices))) or not indices:
            raise CheckpointMismatch(f"{path}: layers are missing; found {sorted(indices)}")
        self.kinds = [self._kind(index) for index in range(len(indices))]

    def describe(self, settings: Settings) -> ModelConfig:
        """The configuration, from shapes where they tell and from settings where they do not."""
        missing: dict[str, str] = {}
        pattern = self._pattern(settings, missing)
        hints = suggestions(self.path)

        def need(field: str, default_hint: str) -> None:
            hint = hints.get(field)
            missing[field] = default_hint if hint is None else f"the name suggests {hint}"

        if settings.parametrization is None:
            need("parametrization", "")
        if settings.window is None and "S" in pattern:
            need("window", "")
        rope_base = settings.rope_base
        if rope_base is None:
            rope_base = 0.0
            if not ("M" in self.kinds and {"C", "G"} & set(self.kinds)):
                need("rope_base", "0 means no positions, 10000 is usual")
        heads = self._heads(settings, missing)
        for field, unused in (
            ("window", "S" not in pattern),
            ("memory_source", "G" not in pattern),
        ):
            if pattern and unused and getattr(settings, field) is not None:
                raise ConfigError(
                    f"--{field.replace('_', '-')}: no layer of {self.path} has one "
                    f"({format_pattern(pattern)}); leave it out"
                )
        if missing:
            options = ", ".join(
                f"--{field.replace('_', '-')}" + (f" ({hint})" if hint else "")
                for field, hint in missing.items()
            )
            raise ConfigError(f"{self.path} does not store everything; please give {options}")
        scheme = Parametrization(settings.parametrization)
        shared = {
            "layer_pattern": pattern,
            "vocab_size": len(self.tensors[EMBEDDING]),
            "hidden_size": self.hidden_size,
            "intermediate_size": self._columns("transformer.h.0.mlp.w3"),
            "window": settings.window if "S" in pattern else None,
            "norm": "layer" if "transformer.ln_f.bias" in self.tensors else "rms",
            "norm_eps": _NORM_EPS,
            "tie_embeddings": self._tied(settings),
        }
        if rope_base:
            shared |= {"position": "rope", "rope_theta": rope_base}
        multipliers = scheme.multipliers(len(self.kinds), heads["head_dim"])
        fields = shared | heads | self._recurrent() | multipliers
        return ModelConfig.from_dict(fields | self._memory(settings, fields))

    @property
    def hidden_size(self) -> int:
        return self.tensors[EMBEDDING].shape[1]

    def _kind(self, index: int) -> str:
        """M, G, C, or A for attention with keys of its own."""
        prefix = LAYER.format(index) + "attn."
        names = {name.removeprefix(prefix) for name in self.tensors if name.startswith(prefix)}
        unsupported = {
            "gmu.norm.weight": "normalised gated memory units",
            "a_proj.weight": "Gated DeltaNet layers",
        }
        for name, what in unsupported.items():
            if name in names:
                raise self._unsupported(index, what)
        if "A_log" in names and self.tensors[prefix + "A_log"].dim() == 1:
            raise self._unsupported(index, "Mamba-2 layers")
        if {"A_log", "x_proj.weight", "conv1d.weight", "dt_proj.weight"} <= names:
            return "M"
        if "gmu.in_proj.weight" in names:
            return "G"
        if {"attn.weight", "proj.weight"} <= names:
            rows = len(self.tensors[prefix + "attn.weight"])
            return "C" if rows == self.tensors[prefix + "proj.weight"].shape[1] else "A"
        raise self._unsupported(index, f"a mixer of the tensors {', '.join(sorted(names)) or '-'}")

    def _unsupported(self, index: int, what: str) -> CheckpointMismatch:
        return CheckpointMismatch(
            f"{self.path}: layer {index} needs {what}, which this package does not have yet"
        )

    def _pattern(self, settings: Settings, missing: dict[str, str]) -> str:
        """One letter per layer; windowed and full attention have the same shapes.

        A cross-decoder reads the last self-attention layer, the only full one of its family.
        """
        readers = [index for index, kind in enumerate(self.kinds) if kind in "CG"]
        first = readers[0] if readers else 0
        own = [index for index, kind in enumerate(self.kinds) if kind == "A"]
        if settings.layer_pattern is not None:
            return self._checked(parse_pattern(settings.layer_pattern))
        if own and (not readers or own[-1] > first):
            hint = "".join(self.kinds).replace("A", "?")
            missing["layer_pattern"] = f"shapes say {hint}, ? being S or F"
            return ""
        return "".join(
            "F" if own and index == own[-1] else "S" if kind == "A" else kind
            for index, kind in enumerate(self.kinds)
        )

    def _checked(self, pattern: str) -> str:
        kinds = "".join("A" if letter in "SF" else letter for letter in pattern)
        if kinds != "".join(self.kinds):
            raise ConfigError(
                f"--layer-pattern {pattern} does not fit {self.path}, whose shapes say "
                f"{''.join(self.kinds).replace('A', '?')}, ? being S or F"
            )
        return pattern

    def _heads(self, settings: Settings, missing: dict[str, str]) -> dict[str, Any]:
        """Attention sizes; the fused projections tell the widths, not how heads divide them."""
        own = [index for index, kind in enumerate(self.kinds) if kind == "A"]
        if not own:
            size = self.hidden_size  # no layer has heads; the fields only have to be there
            return {"num_heads": 1, "num_kv_heads": 1, "head_dim": size}
        prefix = LAYER.format(own[0]) + "attn."
        rows, size = (len(self.tensors[prefix + "attn.weight"]), self._columns(prefix + "proj"))
        kv_size = (rows - size) // 2
        told = {"--head-dim": settings.head_dim}
        for option, count, whole in (
            ("--num-heads", settings.num_heads, size),
            ("--num-kv-heads", settings.num_kv_heads, kv_size),
        ):
            if count is not None and (count < 1 or whole % count):
                raise ConfigError(f"{option} {count} does not divide the width {whole} it has here")
            told[option] = None if count is None else whole // count
        differential = prefix + "da.lambda_q1"
        if differential in self.tensors:
            told["the lambda tensors"] = len(self.tensors[differential])
        sizes = {name: value for name, value in told.items() if value is not None}
        if not sizes:
            missing["head_dim"] = "128 in the published models"
            return {"head_dim": 0}
        source, head_dim = next(reversed(sizes.items()))  # the tensors first, if they tell
        for other, value in sizes.items():
            if value != head_dim:
                raise ConfigError(
                    f"{other} means heads of {value}, {source} of {head_dim}; correct one of them"
                )
        if head_dim < 1 or size % head_dim or kv_size % head_dim:
            raise ConfigError(
                f"--head-dim {head_dim} does not divide the attention widths {size} and {kv_size}"
            )
        return {
            "num_heads": size // head_dim,
            "num_kv_heads": kv_size // head_dim,
            "head_dim": head_dim,
            "attention_bias": prefix + "proj.bias" in self.tensors,
            "attention_variant": "differential" if differential in self.tensors else "softmax",
        }

    def _recurrent(self) -> dict[str, Any]:
        if "M" not in self.kinds:
            return {}
        prefix = LAYER.format(self.kinds.index("M")) + "attn."
        d_inner, d_state = self.tensors[prefix + "A_log"].shape
        if d_inner % self.hidden_size:
            raise CheckpointMismatch(
                f"{self.path}: Mamba layers of {d_inner} channels are no multiple of the hidden "
                f"size {self.hidden_size}; this package cannot express that"
            )
        return {
            "d_state": d_state,
            "expand": d_inner // self.hidden_size,
            "d_conv": self._columns(prefix + "conv1d"),
            "dt_rank": self._columns(prefix + "dt_proj"),
        }

    def _memory(self, settings: Settings, fields: dict[str, Any]) -> dict[str, Any]:
        """The source whose width is that of the gated memory units."""
        if "G" not in self.kinds:
            return {}
        first = self.kinds.index("G")
        rows = len(self.tensors[LAYER.format(first) + "attn.gmu.in_proj.weight"])
        before = self.kinds[:first]
        widths = {MemorySource.MAMBA: fields.get("expand", 0) * self.hidden_size * ("M" in before)}
        if "A" in before:
            widths[MemorySource.ATTENTION] = fields["num_heads"] * fields["head_dim"]
            widths[MemorySource.MLP] = fields["intermediate_size"]
        fitting = [source for source, width in widths.items() if width == rows]
        if settings.memory_source is not None:
            fitting = [source for source in fitting if source == settings.memory_source]
        if not fitting:
            known = ", ".join(f"{source} {width}" for source, width in widths.items())
            raise CheckpointMismatch(
                f"{self.path}: gated memory units of width {rows} fit no memory here ({known})"
            )
        if len(fitting) > 1:
            raise ConfigError(
                f"{self.path}: memories from {' and '.join(fitting)} are all {rows} wide; "
                "please give --memory-source"
            )
        return {"memory_source": fitting[0].value}

    def _tied(self, settings: Settings) -> bool:
        """Tied models store the same matrix twice; --tied and --untied only confirm it."""
        head = self.tensors.get(HEAD)
        tied = head is None or head.equal(self.tensors[EMBEDDING])
        if settings.tied is not None and settings.tied is not tied:
            raise ConfigError(
                f"--{'tied' if settings.tied else 'untied'}: in {self.path}, {HEAD} "
                + ("is absent or equal to" if tied else "differs from")
                + f" {EMBEDDING}; the model is {'tied' if tied else 'not tied'}"
            )
        return tied

    def _columns(self, name: str) -> int:
        tensor = self.tensors.get(f"{name}.weight")
        if tensor is None:
            raise CheckpointMismatch(f"{self.path}: misses tensor '{name}.weight'; incomplete file")
        return tensor.shape[-1]
