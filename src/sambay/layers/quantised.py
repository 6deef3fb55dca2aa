"""Products of few rows with weights that torchao has quantised, by the kernels of this package.

torchao keeps such a weight as a tensor of a class of its own, whose product widens the whole matrix
every time. Inside are plain tensors: integers, and the scales of rows or of groups in them. Where
they say everything about the weight, the kernels read them as they are; integers of 4 bits are
packed first, once, since torchao spends a byte on each. Whatever is more than that (zero points,
quantised or rescaled inputs, packed forms) is left to torchao.

Nothing here imports torchao: there are no such weights before somebody else has.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from sambay.ops.decode import grouped_linear, pack_int4, skinny_linear
from sambay.ops.decode.groups import BLOCK, widen
from sambay.ops.native.library import serves

_HOME = "torchao.quantization"
_INT8, _INTX = "Int8Tensor", "IntxUnpackedToInt8Tensor"
# What such weights consist of besides integers, scales and zero points. Of the inputs none may be
# given; the rest changes nothing that is not in the integers and scales themselves.
_ABOUT_INPUTS = {
    _INT8: {"act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "act_pre_scale"},
    _INTX: {"activation_quantization"},
}
_REST = {"qdata", "scale", "zero_point", "block_size", "dtype", "reduce_range", "target_dtype"}
_NAME_LISTS = (
    "tensor_data_names",
    "tensor_attribute_names",
    "optional_tensor_data_names",
    "optional_tensor_attribute_names",
)
_BITS = {getattr(torch, f"int{bits}"): bits for bits in range(1, 9)}


class _Readable(NamedTuple):
    """How the integers of a weight are multiplied by few rows.

    scale: float32 or bfloat16 of rows (F,) or of groups (F, G); None if torchao has to do it.
    packed: two integers of 4 bits in a byte; None if the integers are read where they are.
    given, versions: the scales this was made of, and how often they, the integers and the weight
        around them had been changed in place: torchao changes what is inside uncounted.
    """

    scale: Tensor | None
    packed: Tensor | None
    given: Tensor
    versions: tuple[int, int, int]


# By the integers instead of the weight: torch refuses to convert a module whose weight has weak
# references. A value must not refer to its key, or neither would ever be freed.
_known = WeakTensorKeyDictionary()


def multiply_rows(x_BD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """x @ weight^T + bias, (B, F), for a weight as torchao made it; None if it has to be asked.

    Not differentiable, and for few rows. What is computed once for a weight is kept as long as
    its integers are in memory, and made again if they or their scales were replaced or changed.
    """
    if torch.compiler.is_compiling() or serves(x_BD) is not None:
        return None
    found = _readable(weight)
    if found is None or found.scale is None:
        return None
    integers: Any = weight.qdata if found.packed is None else found.packed  # pyright: ignore
    if found.scale.dim() == 1:
        return skinny_linear(x_BD, integers, bias, scale_F=found.scale)
    return grouped_linear(x_BD, integers, found.scale, bias)


def rows_in_float32(weight: Tensor, some: slice) -> Tensor | None:
    """Some rows of such a weight as float32 numbers; None if torchao has to be asked for them."""
    found = _readable(weight)
    if found is None or found.scale is None:
        return None
    inner: Any = weight
    scale = found.scale[some]
    return widen(inner.qdata[some], scale[:, None] if scale.dim() == 1 else scale, torch.float32)


def held_tensors(weight: Tensor) -> list[Tensor]:
    """The plain tensors that a weight of torchao's classes above consists of; none for others."""
    if _class_name(weight) is None:
        return []
    inner: Any = weight
    return [inner.qdata, inner.scale]


def _class_name(weight: Tensor) -> str | None:
    kind = type(weight)
    return kind.__name__ if kind.__module__ == _HOME and kind.__name__ in (_INT8, _INTX) else None


def _readable(weight: Tensor) -> _Readable | None:
    """What is known about a weight; None if it is of no class that can be read."""
    name = _class_name(weight)
    if name is None or weight.device.type != "cpu":
        return None
    inner: Any = weight
    integers, scale = inner.qdata, inner.scale
    versions = _version(scale), _version(integers), _version(weight)
    found = _known.get(integers)
    if found is None or found.given is not scale or found.versions != versions:
        # A recorder that watches must see neither this nor the memory it takes: it is no part of a
        # step, and so it is not repeated.
        with torch.inference_mode(False), torch.no_grad(), _disable_current_modes():
            found = _Readable(*_converted(inner, name), scale, versions)
        _known[integers] = found
    return found


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place, as far as torch counts it."""
    return 0 if tensor.is_inference() else tensor._version


def _converted(weight: Any, name: str) -> tuple[Tensor | None, Tensor | None]:
    """Scale and packed integers, as `_Readable` has them."""
    integers, scale, zero_point = weight.qdata, weight.scale, weight.zero_point
    parts = {part for names in _NAME_LISTS for part in getattr(type(weight), names, ())}
    if parts - _REST - _ABOUT_INPUTS[name]:  # another version of torchao, with something unknown
        return None, None
    if any(getattr(weight, part, None) is not None for part in _ABOUT_INPUTS[name]):
        return None, None
    bits = 8 if name == _INT8 else _BITS[weight.target_dtype]
    if integers.dim() != 2 or scale.dim() != 2:
        return None, None
    if zero_point is not None and bool(zero_point.any()):
        return None, None
    features, size = integers.shape
    if scale.shape[0] == 1:  # of the whole matrix
        scale = scale.expand(features, -1)
    if scale.shape[0] != features:
        return None, None
    whole_blocks = size % (BLOCK * scale.shape[1]) == 0
    if scale.dtype not in (torch.float32, torch.bfloat16):
        scale = scale.float()
    if bits <= 4 and whole_blocks:
        return scale.contiguous(), pack_int4(integers)
    if scale.shape[1] == 1:
        return scale[:, 0].float().contiguous(), None
    return (scale.contiguous(), None) if whole_blocks else (None, None)
