"""Comparisons of Triton kernels with their twins, for a process of their own.

    TRITON_INTERPRET=1 python -m tests.triton.interpreted selective_scan ...

The interpreter has to be chosen before triton is imported. On a GPU machine the same comparisons
run compiled, by `test_gpu.py`. Tiles are made small, so that short sequences fill several of them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sambay.ops import decode
from sambay.ops import differential_prefill as prefill
from sambay.ops.decode import triton as decode_kernels
from sambay.ops.differential import differential_attention
from sambay.ops.gate import gated_product
from sambay.ops.gather import gather_rows
from sambay.ops.selective_scan import triton as scan_kernels
from sambay.ops.triton import launch
from tests.numerics.scans import make_inputs, scan_with
from tests.numerics.twins import assert_alike, outputs_and_gradients


def to(device: str, tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


def selective_scan(
    device: str,
    length: int = 11,
    channels: int = 5,
    states: int = 3,
    rows: int = 2,
    dtype: torch.dtype = torch.float32,
    segment: int | None = 8,
    initial: bool = True,
    resets: bool = True,
) -> None:
    """Outputs and gradients, with segments of a given length or as the kernel cuts them."""
    inputs = make_inputs(rows, length, channels, states, dtype, initial=initial, resets=resets)
    reference = [None if x is None else x.float() if x.is_floating_point() else x for x in inputs]
    expected = outputs_and_gradients(scan_with("reference"), reference)
    with contextlib.ExitStack() as stack:
        if segment is not None:
            stack.callback(setattr, scan_kernels, "segment_length", scan_kernels.segment_length)
            scan_kernels.segment_length = lambda shape, device: segment
        actual = outputs_and_gradients(scan_with("triton"), to(device, inputs))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert_alike([result.cpu() for result in actual], expected, tolerance)


def small_scan_tiles() -> None:
    scan_kernels.CHUNK, scan_kernels.CHANNELS, scan_kernels.LANES = 4, 4, 2
    scan_kernels.FORWARD_STEPS = scan_kernels.BACKWARD_STEPS = 2


def decode_attention(device: str, dtype: torch.dtype = torch.float32, capacity: int = 53) -> None:
    """Both decode attentions, with an idle row, and rows of very different lengths."""
    for heads, key_heads, size in ((6, 2, 12), (4, 4, 16)):
        q = torch.randn(3, heads, size, dtype=dtype)
        k, v = torch.randn(2, 3, key_heads, capacity, size, dtype=dtype)
        k[:, :, -1] = v[1] = float("nan")  # what nobody may read
        lengths = torch.tensor([capacity - 1, 0, 17])
        weight, norm_weight = torch.tensor(0.4), torch.randn(2 * size)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for op, others, options in (
            (decode.decode_attention, [], {}),
            (
                decode.decode_differential_attention,
                [weight, norm_weight],
                {"eps": 1e-5, "factor": 0.7},
            ),
        ):
            inputs = [q, k, v, lengths, *others]
            wide = [x.float() if x.is_floating_point() else x for x in inputs]
            expected = op(*wide, scale=0.3, **options, backend="reference")
            actual = op(*to(device, inputs), scale=0.3, **options, backend="triton").cpu()
            assert actual.dtype == dtype
            assert not actual[1].any(), "the idle row gives zeros"
            assert_alike([actual], [expected], tolerance)


def store_columns(device: str, dtype: torch.dtype = torch.float32) -> None:
    """The cache after the store, bit for bit, one row being idle."""
    keys, values = torch.randn(2, 3, 2, 12, dtype=dtype)
    caches = torch.randn(2, 3, 2, 9, 12, dtype=dtype)
    columns = torch.tensor([8, -1, 0])
    expected, actual = caches.clone(), caches.clone().to(device)
    decode.store_columns(keys, values, *expected, columns, backend="reference")
    decode.store_columns(
        keys.to(device), values.to(device), *actual, columns.to(device), backend="triton"
    )
    assert torch.equal(actual.cpu(), expected)
    assert not torch.equal(expected, caches)


def mamba_step(device: str, dtype: torch.dtype = torch.float32) -> None:
    """Three tokens, each with y and both states."""
    B, E, N, R, W = 2, 13, 3, 2, 4
    parameters = [
        torch.randn(E, W, dtype=dtype),
        torch.randn(E, dtype=dtype),
        torch.randn(R + 2 * N, E, dtype=dtype) * 0.3,
        torch.randn(E, R, dtype=dtype),
        torch.randn(E),
        torch.randn(E, N),
        torch.randn(E),
    ]
    conv, ssm = torch.randn(B, W - 1, E, dtype=dtype), torch.randn(B, E, N)
    expected = {"conv_state_BCE": conv.clone(), "ssm_state_BEN": ssm.clone()}
    actual = {"conv_state_BCE": conv.to(device), "ssm_state_BEN": ssm.to(device)}
    for _ in range(3):
        u = torch.randn(B, E, dtype=dtype)
        y = decode.mamba_step(u, *parameters, **expected, backend="reference")
        other = decode.mamba_step(u.to(device), *to(device, parameters), **actual, backend="triton")
        tolerance = 1e-5 if dtype == torch.float32 else 4e-2
        pairs = [(other, y), *((actual[name], expected[name]) for name in expected)]
        assert_alike([a.cpu() for a, _ in pairs], [e for _, e in pairs], tolerance)


def output_gate(device: str) -> None:
    """The scan's step with a gate, which `mamba_step` leaves to the layer."""
    B, E, N = 2, 9, 3
    x, delta, gate = torch.randn(3, B, E)
    A_log, D, bias, state = torch.randn(E, N), torch.randn(E), torch.randn(E), torch.randn(B, E, N)
    B_BN, C_BN = torch.randn(2, B, N)
    expected = state.clone()
    y = decode.reference.scan_step(x, delta, -A_log.exp(), B_BN, C_BN, D, bias, expected)
    y = y * torch.nn.functional.silu(gate)
    inputs = to(device, [x, delta, A_log, B_BN, C_BN, D, bias, gate, state, torch.empty(B, E)])
    launch.launch(
        "mamba_step", "scan_step", (3, B), *inputs, E, E, E, N, N, E,
        STATES=N, BLOCK_N=4, BLOCK_E=4, HAS_GATE=True, num_warps=1,
    )  # fmt: skip
    assert_alike([inputs[9].cpu(), inputs[8].cpu()], [y, expected], 1e-5)


def elementwise(device: str, dtype: torch.dtype = torch.float32) -> None:
    """The product with a gate on a strided half and its gradients; one row of every sequence."""
    both = torch.randn(3, 5, 14, dtype=dtype)
    inputs = [both[..., :7], both[..., 7:]]
    expected, actual = (
        outputs_and_gradients(
            lambda a, m, name=name: (gated_product(a, m, backend=name),), to(where, inputs)
        )
        for name, where in (("reference", "cpu"), ("triton", device))
    )
    assert_alike([x.cpu() for x in actual], expected, 1e-5 if dtype == torch.float32 else 2e-2)
    places = torch.tensor([4, 0, 2])
    gathered = gather_rows(both.to(device), places.to(device), backend="triton")
    assert torch.equal(gathered.cpu(), gather_rows(both, places, backend="reference"))


def differential_prefill(device: str, dtype: torch.dtype = torch.float32) -> None:
    """Causal, windowed, padded and packed, the queries being all columns or the last of them."""
    B, H, K, T, S, P = 2, 8, 4, 9, 21, 12
    q = torch.randn(B, H, S, P, dtype=dtype)
    k, v = torch.randn(2, B, K, S, P, dtype=dtype)
    weight = torch.tensor(0.4)
    starts, segments = torch.tensor([0, 15]), torch.randint(0, 3, (B, S)).sort(1).values
    for queries, options in (
        (T, {"window": None}),
        (T, {"window": 6, "starts_B": starts}),
        (S, {"window": 5, "segments_BT": segments}),
    ):
        part = q[:, :, S - queries :]
        wide = [x.float() for x in (part, k, v, weight)]
        expected = differential_attention(*wide, scale=0.3, **options, backend="reference")
        moved = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in options.items()}
        inputs = to(device, [part, k, v, weight])
        actual = prefill.differential_prefill(*inputs, scale=0.3, **moved)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert_alike([actual.cpu()], [expected], tolerance)


CHECKS: dict[str, Callable[..., None]] = {
    check.__name__: check
    for check in (
        selective_scan,
        decode_attention,
        store_columns,
        mamba_step,
        output_gate,
        elementwise,
        differential_prefill,
    )
}


def patch_once() -> None:
    """Let the interpreter put its functions in place of the language's once, and leave them there.

    It does so again for every call of an inner function, which takes most of its time.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    prepare = interpreter._patch_lang
    prepared: dict[tuple[bool, bool], Any] = {}

    def prepare_once(function: Any) -> Any:
        names = list(function.__globals__.values())
        seen = (any(value is tl for value in names), any(value is tl.core for value in names))
        if seen not in prepared:
            prepared[seen] = prepare(function)
            prepared[seen].restore = lambda: None
        return prepared[seen]

    interpreter._patch_lang = prepare_once


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    assert launch.interpreted(), "set TRITON_INTERPRET=1"
    patch_once()
    decode_kernels.COLUMNS = prefill.QUERIES = prefill.COLUMNS = 16
    small_scan_tiles()
    for name in names:
        torch.manual_seed(0)
        check, _, options = name.partition(":")
        CHECKS[check]("cpu", **eval(f"dict({options})", {"torch": torch}))
        print(name)


if __name__ == "__main__":
    main(sys.argv[1:])
