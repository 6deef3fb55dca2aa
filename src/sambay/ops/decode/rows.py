"""What a decode step does with its few rows between mixers and matrix products.

Each of these is an operation of its own so that a step consists of nothing else than decode
operations: on a CPU it can then be recorded and replayed without Python. None is differentiable.
Shape letters as in `sambay.ops.decode`; F features, R half a head.
"""

from __future__ import annotations

from torch import Tensor

from sambay.ops import registry
from sambay.ops.decode import native_rows as native
from sambay.ops.decode import reference_rows as reference
from sambay.ops.decode.gradients import without_gradients
from sambay.ops.decode.native import serves_decoding
from sambay.ops.gate.triton import multiply
from sambay.ops.triton.launch import why_unavailable_untraced

for _op, _reference, _native, _serves in (
    ("embed_rows", reference.embed, native.embed, serves_decoding),
    ("norm_rows", reference.norm, native.norm, serves_decoding),
    ("gate_rows", reference.gate, native.gate, serves_decoding),
    ("add_rows", reference.add, native.add, serves_decoding),
    ("count_columns", reference.count, native.count, native.serves_places),
    ("slot_places", reference.places, native.places, native.serves_places),
    ("rotary_turns", reference.turns, native.turns, native.serves_places),
    ("rotate_heads", reference.rotate, native.rotate, serves_decoding),
):
    registry.register(_op, "reference", 0, _reference)
    registry.register(_op, "native", 20, _native, _serves)

registry.register("gate_rows", "triton", 20, multiply, why_unavailable_untraced)


@without_gradients
def embed_rows(
    tokens_B: Tensor, weight_VD: Tensor, *, factor: float = 1.0, backend: str | None = None
) -> Tensor:
    """factor * the rows of the tokens (int64), (B, D) in float32, or in float64 if those are.

    Raises:
        BackendUnavailable: the named backend cannot serve this call.
    """
    return registry.choose("embed_rows", backend, weight_VD)(tokens_B, weight_VD, factor)


@without_gradients
def norm_rows(
    x_BD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor | None = None,
    *,
    eps: float,
    centred: bool = False,
    factor: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """factor * (x / rms(x) * weight + bias), (B, D) in the weight's dtype, to which x is cast.

    With `centred` the mean of x is subtracted first, which makes it a LayerNorm.

    Raises:
        BackendUnavailable: the named backend cannot serve this call.
    """
    assert x_BD.shape[1:] == weight_D.shape, (x_BD.shape, weight_D.shape)
    norm = registry.choose("norm_rows", backend, weight_D)
    return norm(x_BD, weight_D, bias_D, eps, factor, centred)


@without_gradients
def gate_rows(gate_BF: Tensor, value_BF: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(gate) * value, (B, F) in their dtype.

    Raises:
        BackendUnavailable: the named backend cannot serve this call.
    """
    assert gate_BF.shape == value_BF.shape, (gate_BF.shape, value_BF.shape)
    return registry.choose("gate_rows", backend, gate_BF)(gate_BF, value_BF)


@without_gradients
def add_rows(
    x_BD: Tensor, y_BD: Tensor, *, factor: float = 1.0, backend: str | None = None
) -> Tensor:
    """x + factor * y, (B, D) in x's dtype: the residual stream, float32, and a layer's output.

    Raises:
        BackendUnavailable: the named backend cannot serve this call.
    """
    assert x_BD.shape == y_BD.shape, (x_BD.shape, y_BD.shape)
    return registry.choose("add_rows", backend, x_BD)(x_BD, y_BD, factor)


def count_columns(lengths_B: Tensor, *, backend: str | None = None) -> None:
    """Count one more column in every slot, in place, except in idle ones, whose length is 0.

    Raises:
        BackendUnavailable: the named backend cannot serve this call.
    """
    registry.choose("count_columns", backend, lengths_B)(lengths_B)


def slot_places(
    lengths_B: Tensor, ring: int | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Where the newest column of each slot lies, -1 in idle ones, and how many columns count.

    In a `ring` of so many columns it lies at that modulo its size, and no more count.

    Raises:
        BackendUnavailable: the named backend cannot serve this call.
    """
    return registry.choose("slot_places", backend, lengths_B)(lengths_B, ring)


def rotary_turns(
    columns_B: Tensor, frequencies_R: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of column * frequency, (B, R) in float32.

    Raises:
        BackendUnavailable: the named backend cannot serve this call.
    """
    return registry.choose("rotary_turns", backend, columns_B)(columns_B, frequencies_R)


@without_gradients
def rotate_heads(
    x_BHP: Tensor, cosines_BR: Tensor, sines_BR: Tensor, *, backend: str | None = None
) -> Tensor:
    """Heads whose halves are turned by those angles, (B, H, P) in x's dtype.

    Raises:
        BackendUnavailable: the named backend cannot serve this call.
    """
    assert x_BHP.shape[2] == 2 * cosines_BR.shape[1], (x_BHP.shape, cosines_BR.shape)
    return registry.choose("rotate_heads", backend, x_BHP)(x_BHP, cosines_BR, sines_BR)
