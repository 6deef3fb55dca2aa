"""The Triton kernels against their twins: interpreted here, compiled where there is a GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sambay.errors import BackendUnavailable
from sambay.ops import registry
from sambay.ops.selective_scan import selective_scan
from sambay.ops.triton import launch
from tests.numerics.scans import make_inputs, scan_with
from tests.triton import interpreted

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run(module: str, *arguments: str, interpret: bool) -> str:
    """What a process of its own prints; triton asks how to run before it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@needs_triton
@pytest.mark.parametrize(
    "checks",
    [
        ("selective_scan",),
        (
            "decode_attention",
            "store_columns",
            "mamba_step",
            "output_gate",
            "elementwise",
            "differential_prefill",
        ),
    ],
    ids=["scan", "others"],
)
def test_interpreted_kernels_equal_their_twins(checks: tuple[str, ...]) -> None:
    assert run("tests.triton.interpreted", *checks, interpret=True).split() == list(checks)


BFLOAT = "dtype=torch.bfloat16"


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(
    "check",
    [
        "selective_scan:length=1,segment=None,initial=False,resets=False",
        "selective_scan:length=29,channels=9,states=16,segment=None",
        "selective_scan:length=24,channels=8,states=4,segment=12,resets=False",
        "selective_scan:length=19,channels=3,segment=4,initial=False",
        f"selective_scan:length=13,{BFLOAT}",
        f"decode_attention:capacity=100,{BFLOAT}",
        f"mamba_step:{BFLOAT}",
        f"store_columns:{BFLOAT}",
        f"elementwise:{BFLOAT}",
    ],
)
def test_interpreted_kernels_at_more_shapes(check: str) -> None:
    assert run("tests.triton.interpreted", check, interpret=True).split() == [check]


@pytest.mark.slow
@needs_triton
def test_every_kernel_compiles_without_a_gpu() -> None:
    printed = run("tests.triton.compiled", "90", "cheap", interpret=False)
    kernels = set()
    for file in (ROOT / "src/sambay/ops/triton/kernels").glob("*.py"):
        if file.stem != "arithmetic":
            kernels |= set(re.findall(r"^@triton\.jit\ndef ([a-z]\w*)", file.read_text(), re.M))
    assert {line.split()[1] for line in printed.splitlines()} == kernels


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_every_variant_compiles_for(architecture: str) -> None:
    run("tests.triton.compiled", architecture, "all", interpret=False)


def test_the_reason_why_there_are_no_kernels_is_said() -> None:
    rows = {(row.op, row.backend): row for row in registry.table()}
    for op in ("selective_scan", "decode_attention", "store_columns", "mamba_step"):
        row = rows[op, "triton"]
        assert row.available == (launch.why_unavailable(None) is None)
        assert row.available or "triton" in row.reason or "CUDA" in row.reason
    with pytest.raises(BackendUnavailable, match="'triton' cannot be used"):
        scan_with("triton")(*make_inputs(1, 2, 3, 2, torch.float64))


@pytest.mark.gpu
@pytest.mark.parametrize("check", sorted(interpreted.CHECKS))
def test_compiled_kernels_equal_their_twins(check: str) -> None:
    interpreted.CHECKS[check]("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 63, 100, 1000])
@pytest.mark.parametrize("channels", [48, 96, 100])
@pytest.mark.parametrize("segment", [None, 32, 96])
def test_compiled_scan_at_odd_shapes(
    length: int, channels: int, segment: int | None, dtype: torch.dtype
) -> None:
    interpreted.selective_scan(
        "cuda", length=length, channels=channels, states=16, dtype=dtype, segment=segment
    )


@pytest.mark.gpu
def test_compiled_decode_attention_over_a_long_cache() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        interpreted.decode_attention("cuda", dtype=dtype, capacity=4097)
        interpreted.store_columns("cuda", dtype=dtype)
        interpreted.mamba_step("cuda", dtype=dtype)
        interpreted.elementwise("cuda", dtype=dtype)


@pytest.mark.gpu
def test_the_default_backend_on_a_gpu_is_triton_and_captured_in_a_graph() -> None:
    x, delta, A, B, C, D, bias, _, _ = (
        None if tensor is None else tensor.cuda() for tensor in make_inputs(1, 64, 32, 16)
    )
    options = {"delta_bias_E": bias}
    for _ in range(2):  # kernels are compiled outside of the capture
        expected, _ = selective_scan(x, delta, A, B, C, D, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = selective_scan(x, delta, A, B, C, D, **options)
    graph.replay()
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
