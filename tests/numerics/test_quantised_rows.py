"""Few rows times weights that torchao quantised: the products it gives itself, without its code."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sambay.layers import quantised
from sambay.layers.projection import MOST_ROWS, Linear, few_rows
from sambay.layers.quantised import held_tensors, multiply_rows
from sambay.ops.native.library import why_unavailable

quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason="no C++ kernels here")
D, FEATURES = 192, 75
DTYPES = [torch.float32, torch.bfloat16]


def int8(**options: Any) -> Any:
    return quantization.Int8WeightOnlyConfig(**options)


def intx(bits: int, granularity: Any, **options: Any) -> Any:
    dtype = getattr(torch, f"int{bits}")
    return quantization.IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity, **options)


def group(size: int) -> Any:
    return quantization.PerGroup(size)


READ: dict[str, Callable[[], Any]] = {
    "int8 rows": int8,
    "int8 matrix": lambda: int8(granularity=quantization.PerTensor()),
    "int8 groups": lambda: int8(granularity=group(64)),
    "intx int8 rows": lambda: intx(8, quantization.PerAxis(0)),
    "intx int6 groups": lambda: intx(6, group(96)),
    "int4 groups of 32": lambda: intx(4, group(32)),
    "int4 groups of 64": lambda: intx(4, group(64)),
    "int4 rows": lambda: intx(4, quantization.PerAxis(0)),
    "int2 groups": lambda: intx(2, group(32)),
}
LEFT: dict[str, Callable[[], Any]] = {
    "groups of 48": lambda: intx(4, group(48)),
    "zero points": lambda: intx(4, group(32), mapping_type=quantization.MappingType.ASYMMETRIC),
    "quantised inputs": lambda: quantization.Int8DynamicActivationInt8WeightConfig(),
    "quantised inputs of int4": lambda: quantization.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=group(32)
    ),
    "floats": lambda: quantization.Float8WeightOnlyConfig(),
}


def linear_of(scheme: Any, dtype: torch.dtype = torch.float32, features: int = FEATURES) -> Linear:
    linear = Linear(D, features).to(dtype)
    quantization.quantize_(linear, scheme, filter_fn=lambda module, name: True)
    assert type(linear.weight) is not nn.Parameter
    return linear.requires_grad_(False)


def rows_of(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, D).to(dtype)


def assert_same_product(out: Tensor, linear: nn.Linear, x: Tensor) -> None:
    """What the weight says, in float64; a result of bfloat16 is rounded once."""
    weight: Any = linear.weight
    if x.dtype is torch.float32:
        whole = weight.dequantize().double()
        tolerance = 1e-5
    else:  # torchao rounds weights, or scales, which are compared before that
        scale = weight.scale.double()
        scale = scale.expand(-1, D) if scale.shape == (1, 1) else scale
        scale = scale.repeat_interleave(D // scale.shape[1], dim=1)
        whole = weight.qdata.double() * scale
        tolerance = 4e-3
    bias = None if linear.bias is None else linear.bias.double()
    expected = F.linear(x.double(), whole, bias)
    assert out.dtype == x.dtype
    assert (out.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", READ)
@torch.no_grad()
def test_weights_that_are_read(name: str, dtype: torch.dtype) -> None:
    linear = linear_of(READ[name](), dtype)
    for count in (1, 3, 32):
        x = rows_of(count, dtype)
        out = multiply_rows(x, linear.weight, linear.bias)
        assert out is not None
        assert_same_product(out, linear, x)
        assert torch.equal(few_rows(linear, x), out)
        assert torch.equal(linear(x[:, None]), out[:, None])
        own = F.linear(x, linear.weight, linear.bias)
        tolerance = 1e-4 if dtype is torch.float32 else 2e-2  # its own rounding is in these
        assert (out - own).abs().max() <= tolerance * own.abs().max()


@pytest.mark.parametrize("name", LEFT)
@torch.no_grad()
def test_weights_that_are_left_to_torchao(name: str) -> None:
    linear, x = linear_of(LEFT[name](), torch.bfloat16), rows_of(2, torch.bfloat16)
    assert multiply_rows(x, linear.weight, linear.bias) is None
    own = F.linear(x, linear.weight, linear.bias)
    assert torch.equal(few_rows(linear, x), own)
    assert torch.equal(linear(x), own)


@torch.no_grad()
def test_packed_prototypes_are_left_to_torchao() -> None:
    module = pytest.importorskip("torchao.prototype.quantization.int4")
    linear = linear_of(module.PrototypeInt4WeightOnlyConfig(group_size=32), features=64)
    x = rows_of(2)
    assert held_tensors(linear.weight) == []
    assert torch.equal(few_rows(linear, x), F.linear(x, linear.weight, linear.bias))


@torch.no_grad()
def test_a_version_of_torchao_with_something_unknown_is_left_to_it(monkeypatch) -> None:
    linear, x = linear_of(int8()), rows_of(2)
    kind: Any = type(linear.weight)
    names = [*kind.optional_tensor_data_names, "curvature"]
    monkeypatch.setattr(kind, "optional_tensor_data_names", names)
    assert multiply_rows(x, linear.weight, None) is None


@pytest.mark.parametrize("scheme", ["int8 rows", "int4 groups of 32"])
@torch.no_grad()
def test_many_rows_and_gradients_are_torchaos(scheme: str, monkeypatch) -> None:
    linear = linear_of(READ[scheme]())
    calls = []
    monkeypatch.setattr(
        "sambay.layers.projection.multiply_rows", lambda *given: calls.append(given)
    )
    linear(rows_of(MOST_ROWS + 1))
    few_rows(linear, rows_of(MOST_ROWS + 1))
    with torch.enable_grad():
        x = rows_of(2).requires_grad_()
        linear(x).sum().backward()
    assert not calls
    weight: Any = linear.weight
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(2, -1))
    linear(rows_of(2))
    assert len(calls) == 1


@torch.no_grad()
def test_a_hook_is_called() -> None:
    linear, seen = linear_of(int8()), []
    linear.register_forward_hook(lambda module, given, out: seen.append(out))
    few_rows(linear, rows_of(2))
    assert len(seen) == 1


@pytest.mark.parametrize("scheme", ["int8 rows", "int4 groups of 32"])
@torch.no_grad()
def test_a_weight_that_is_replaced_or_changed_is_read_anew(scheme: str) -> None:
    linear, x = linear_of(READ[scheme]()), rows_of(3)
    before = few_rows(linear, x)
    other = linear_of(READ[scheme]())
    linear.weight = other.weight
    assert_same_product(few_rows(linear, x), linear, x)
    weight: Any = linear.weight
    weight.qdata.neg_().clamp_(-7, 7)
    assert_same_product(few_rows(linear, x), linear, x)
    weight.scale.mul_(2)
    assert_same_product(few_rows(linear, x), linear, x)
    weight.scale = weight.scale * 3
    assert_same_product(few_rows(linear, x), linear, x)
    another = linear_of(READ[scheme]())
    linear.load_state_dict(another.state_dict())
    assert torch.equal(few_rows(linear, x), few_rows(another, x))
    assert not torch.equal(few_rows(linear, x), before)


@pytest.mark.parametrize("scheme", ["int8 rows", "int4 groups of 32"])
@torch.no_grad()
def test_what_is_kept_hinders_nothing_and_goes_with_the_weight(scheme: str) -> None:
    gc.collect()
    known = len(quantised._known)
    linear, x = linear_of(READ[scheme]()), rows_of(3)
    few_rows(linear, x)
    assert len(quantised._known) == known + 1
    names = set(linear.state_dict())
    linear.to(torch.bfloat16)  # refused by torch for a weight with weak references
    assert_same_product(few_rows(linear, x.bfloat16()), linear, x.bfloat16())
    twin = copy.deepcopy(linear)
    assert torch.equal(few_rows(twin, x.bfloat16()), few_rows(linear, x.bfloat16()))
    assert set(linear.state_dict()) == names
    held = held_tensors(linear.weight)
    weight: Any = linear.weight
    assert held[0] is weight.qdata
    assert held[1] is weight.scale
    del linear, twin, held, weight
    gc.collect()
    assert len(quantised._known) == known


def test_plain_weights_are_not_read_here() -> None:
    weight = torch.randn(3, D)
    assert held_tensors(weight) == []
    assert multiply_rows(rows_of(2), weight, None) is None
