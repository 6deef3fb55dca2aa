"""The count of every part against what torch counts, and against the operations of definitions."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sambay.errors import ConfigError
from sambay.ops import gated_delta as gated_delta_op
from sambay.ops import selective_scan as selective_scan_op
from sambay.ops import state_space_dual as state_space_dual_op
from sambay.spec import AttentionVariant, ModelConfig, RecurrentKind, flops, footprint, presets
from tests.tiny import FAMILY, random_ids, tiny_config, tiny_model

ATTENDING = "SFC"


@pytest.mark.parametrize("name", FAMILY)
def test_products_of_a_model_are_those_that_torch_counts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With attention by its definition, which multiplies every pair of columns and hides some.

    Differential maps are made once for either half of the values there, so that a pair costs 8
    per channel of the heads and not 6.
    """
    monkeypatch.setenv("SAMBAY_REFERENCE", "1")
    tokens, model = 9, tiny_model(name, dtype=torch.float32)
    config = model.config
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(random_ids(1, tokens))
    parts = flops.forward_parts(config, tokens)
    windows = [layer.window for layer in config.layers if layer.kind in ATTENDING]
    visible = sum(footprint.visible_pairs(tokens, window) for window in windows)
    per_pair = footprint.pair_flops(config)
    assert parts.attention == per_pair * visible
    if config.attention_variant is AttentionVariant.DIFFERENTIAL:
        per_pair = 8 * config.attention_size
    everything = parts.projections + parts.head + per_pair * len(windows) * tokens**2
    assert counter.get_total_flops() == everything


@pytest.mark.parametrize("name", presets.NAMES)
def test_products_are_those_of_the_footprint(name: str) -> None:
    config = presets.build(name, 16)
    parts = flops.training_parts(config, 4096)
    products = parts.projections + parts.attention + parts.head
    assert products == footprint.training_flops(config, 4096)
    assert parts.total == products + parts.recurrence + parts.convolution
    assert parts.embedding == 0
    has_state = "M" in config.layer_pattern
    assert (parts.recurrence > 0) == (parts.convolution > 0) == has_state


class Operations(TorchDispatchMode):
    """Counts one operation per element that arithmetic makes, and per element that a sum eats."""

    ARITHMETIC = ("add", "sub", "mul", "exp", "softplus")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")
        if name == "sum":
            self.count += args[0].numel() - out.numel()
        elif name in self.ARITHMETIC:
            self.count += out.numel()
        else:
            moved = ("stack", "select", "unsqueeze", "slice", "view", "new_zeros", "zeros",
                     "_to_copy", "expand", "masked_fill", "detach", "alias", "cat")  # fmt: skip
            assert name in moved, f"is {name} arithmetic?"
        return out


def inputs(config: ModelConfig, tokens: int) -> tuple[list[Tensor], dict[str, object]]:
    """Random arguments of the recurrence of a model, for one row."""
    rand = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    E, N = config.d_inner, config.d_state
    H, P = config.recurrent_heads, config.recurrent_head_dim
    if config.recurrent_kind is RecurrentKind.MAMBA:
        return [
            rand(1, tokens, E), rand(1, tokens, E), -rand(E, N).exp(), rand(1, tokens, N),
            rand(1, tokens, N), rand(E),
        ], {"delta_bias_E": rand(E)}  # fmt: skip
    if config.recurrent_kind is RecurrentKind.MAMBA2:
        return [
            rand(1, tokens, H, P), rand(1, tokens, H), -rand(H).exp(), rand(1, tokens, N),
            rand(1, tokens, N), rand(H),
        ], {"delta_bias_H": rand(H)}  # fmt: skip
    q, k = (gated_delta_op.l2_normalise(rand(1, tokens, H, N)) for _ in range(2))
    rates = [-rand(1, tokens, H).exp(), rand(1, tokens, H).sigmoid()]
    return [q, k, rand(1, tokens, H, P), *rates], {"scale": 0.5}


def substitution(triangle: torch.Size, right: torch.Size, **_: object) -> int:
    """Each column of the right side: a product and a subtraction for every pair of its rows."""
    return right.numel() * (right[-2] - 1)


def added_product(into: torch.Size, left: torch.Size, right: torch.Size, **_: object) -> int:
    return 2 * left.numel() * right[-1]


# What torch's counter passes over: a product added in place, and substitution.
UNCOUNTED = {
    torch.ops.aten.baddbmm_: added_product,
    torch.ops.aten.linalg_solve_triangular: substitution,
}
OPS = {
    "sambay": selective_scan_op.selective_scan,
    "sambay-2": state_space_dual_op.state_space_dual,
    "gdny": gated_delta_op.gated_delta,
}


@pytest.mark.parametrize("name", OPS)
def test_recurrences_one_token_after_another_are_their_definitions(name: str) -> None:
    config, tokens = tiny_config(name), 7
    arguments, options = inputs(config, tokens)
    with torch.no_grad(), Operations() as counter:
        OPS[name](*arguments, **options, backend="reference")
    assert counter.count == flops.recurrence_flops(config, tokens, chunk=None)


@pytest.mark.parametrize("name", ["sambay-2", "gdny"])
@pytest.mark.parametrize("tokens", [128, 1])
def test_recurrences_by_chunks_are_the_products_of_the_torch_backends(
    name: str, tokens: int
) -> None:
    config = tiny_config(name)
    arguments, options = inputs(config, tokens)
    if name == "gdny":
        _, chunk = gated_delta_op.chunked.chunk_size(tokens, config.d_state)
        forward = gated_delta_op.chunked.forward
        arguments += [None, None, options["scale"], False]
    else:
        chunk = state_space_dual_op.chunked.CHUNK
        forward = state_space_dual_op.chunked.forward
        arguments += [options["delta_bias_H"], None, None, False]
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        forward(*arguments)
    assert counter.get_total_flops() == flops.recurrence_flops(config, tokens, chunk=chunk)


def test_a_shorter_last_chunk_counts_as_what_it_is() -> None:
    config = tiny_config("sambay-2")
    count = functools.partial(flops.recurrence_flops, config)
    assert count(70, chunk=32) == 2 * count(32, chunk=32) + count(6, chunk=6)


def test_convolutions_are_counted_as_torch_counts_them() -> None:
    config, tokens = tiny_config("gdny"), 9
    channels = 15 + 2 * 9  # values; keys and queries of 3 heads of 3
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.conv1d(
            torch.randn(1, channels, tokens + 3), torch.randn(channels, 1, 4), groups=channels
        )
    assert flops.forward_parts(config, tokens).convolution == 5 * counter.get_total_flops()


def test_impossible_lengths_are_refused() -> None:
    for arguments in ({"tokens": 0}, {"tokens": 4, "chunk": 0}):
        with pytest.raises(ConfigError, match="it must be 1 or more"):
            flops.forward_parts(tiny_config("gdny"), **arguments)
