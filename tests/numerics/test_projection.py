"""Products of many rows in bfloat16 where the processor has none: in float32, piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sambay.layers import projection
from sambay.layers.projection import MOST_ROWS, Linear


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shapes of products in float32, on a processor without bfloat16, in pieces of 7 rows."""
    shapes: list[tuple[int, int]] = []

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.dtype == torch.float32:
            shapes.append((len(weight), weight.shape[1]))
        return F.linear(x, weight, bias)

    monkeypatch.setattr(projection, "_multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(projection, "_WIDENED", 7 * 24)
    monkeypatch.setattr(projection, "F", SimpleNamespace(linear=linear))
    return shapes


def linear_of(bias: bool, dtype: torch.dtype = torch.bfloat16) -> Linear:
    torch.manual_seed(1)
    return Linear(24, 17, bias=bias).to(dtype)


def rows(count: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(2, count // 2, 24, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("bias", [False, True])
def test_the_product_is_the_exact_one_rounded_once(bias: bool, widened: list) -> None:
    linear, x = linear_of(bias), rows(MOST_ROWS + 2)
    with torch.no_grad():
        y = linear(x)
    assert widened == [(7, 24), (7, 24), (3, 24)]
    exact = torch.nn.functional.linear(
        x.double(), linear.weight.double(), linear.bias.double() if bias else None
    )
    assert y.dtype == torch.bfloat16
    assert y.shape == (2, MOST_ROWS // 2 + 1, 17)
    # Half a unit in the last of 8 bits, and what float32 adds to a number between two.
    assert torch.all((y.double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda: linear_of(False)(rows(MOST_ROWS + 2)),  # with gradients
        lambda: linear_of(False, torch.float32)(rows(MOST_ROWS + 2, torch.float32)).bfloat16(),
    ],
    ids=["gradients", "float32"],
)
def test_others_are_multiplied_by_torch(call: Callable[[], Tensor], widened: list) -> None:
    call()
    assert widened in ([], [(17, 24)])  # whole, if in float32


def test_few_rows_are_not_widened(widened: list) -> None:
    with torch.no_grad():
        linear_of(True)(rows(MOST_ROWS))
    assert widened == []


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weights_that_torchao_quantised(weights: str, widened: list) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = torch.nn.Sequential(Linear(64, 17, bias=False).bfloat16())
    how = quantization.Int8WeightOnlyConfig()
    if weights == "int4":
        how = quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=quantization.PerGroup(32)
        )
    quantization.quantize_(model, how)
    x = torch.randn(MOST_ROWS + 1, 64).bfloat16()
    with torch.no_grad():
        y = model(x)
    assert len(widened) == 9  # two rows of 64 in each piece
    weight = model[0].weight
    scale = weight.scale.double()
    numbers = weight.qdata.double().view(17, scale.shape[1], -1) * scale[..., None]
    exact = x.double() @ numbers.view(17, 64).T
    assert torch.all((y.double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-6)
    assert torch.allclose(numbers.view(17, 64), weight.dequantize().double(), rtol=2.0**-7)
