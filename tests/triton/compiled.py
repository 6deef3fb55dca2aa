"""Ahead-of-time compilation of every Triton kernel, which needs no GPU, for a process of its own.

python -m tests.triton.compiled 90 cheap|all

"cheap" is one case per kernel. What decides the speed of the scan is asserted where it can be seen
without running: that the states of a channel lie within a thread, so nothing is exchanged.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from sambay.ops.triton.launch import kernel

# Arguments that every caller passes as multiples of 16 for the usual sizes.
ALIGNED = {"channels", "width", "segment", "capacity"}
SCAN = {"STATES": 16, "BLOCK_N": 16, "CHUNK": 32}
FORWARD = SCAN | {"BLOCK_E": 32, "STEPS": 8, "HAS_START": True, "HAS_RESETS": True, "SAVE": True}
FOLD = {"STATES": 16, "BLOCK_N": 16, "BLOCK_E": 32, "STEPS": 8, "HAS_RESETS": True}
CHAIN = {"STATES": 16, "BLOCK_N": 16, "BLOCK_E": 32, "HAS_BEGIN": True}
BACKWARD = SCAN | {
    "R": 4, "L": 8, "STEPS": 4, "HAS_LAST": True, "HAS_START": True, "HAS_RESETS": True,
}  # fmt: skip
PART = {"GROUP": 2, "ROWS": 16, "HEAD": 64, "BLOCK_P": 64, "BLOCK_S": 64, "PRECISION": "ieee"}
MERGE = {"GROUP": 2, "HEAD": 64, "BLOCK_PARTS": 8}
PREFILL = {
    "HEAD": 64, "BLOCK_P": 64, "BLOCK_T": 64, "BLOCK_S": 64, "HAS_STARTS": True,
    "HAS_SEGMENTS": True, "PRECISION": "ieee",
}  # fmt: skip
STEP = {"STATES": 16, "BLOCK_N": 16, "BLOCK_E": 64}
# Pointers of the values' dtype, pointers of other dtypes, and numbers that are not int32.
VALUES = "x delta dy dx ddelta y q k v keys values a m da dm gate out B_N C_N"
OTHERS = {"resets": "*u8"} | dict.fromkeys(("lengths", "columns", "places", "segments"), "*i64")
NUMBERS = {"scale": "fp32", "eps": "fp32", "factor": "fp32"}
SIZES = "length channels chunks segment groups capacity parts heads width queries window group"

Case = tuple[str, str, dict[str, Any], dict[str, Any], str]


def cases(everything: bool) -> Iterator[Case]:
    """(module, kernel, constants, options, dtype)"""
    one, four = {"num_warps": 1}, {"num_warps": 4}
    half = "*bf16"
    few = {} if everything else {"STEPS": 4}
    yield "scan_forward", "scan_forward", FORWARD | few, one, half
    yield "scan_segments", "scan_fold", FOLD | {"REVERSE": False} | few, one, half
    yield "scan_segments", "scan_chain", CHAIN | {"REVERSE": True}, four, half
    yield "scan_backward", "scan_backward", BACKWARD | few, one, half
    yield "decode_attention", "attend_part", PART | {"MAPS": 2}, four | {"num_stages": 3}, half
    yield "decode_attention", "merge_parts", MERGE | {"MAPS": 2, "BLOCK_E": 128}, four, half
    yield "decode_attention", "store_columns", {"HEAD": 64, "BLOCK": 1024}, four, half
    yield "differential", "differential_forward", PREFILL, four | {"num_stages": 2}, half
    yield "mamba_step", "conv_step", {"WIDTH": 4, "BLOCK_E": 256}, four, half
    yield "mamba_step", "scan_step", STEP | {"HAS_GATE": True}, four, half
    for name in ("gate_forward", "gate_backward", "gather_rows"):
        yield "elementwise", name, {"BLOCK": 1024}, four, half
    if not everything:
        return
    off = {"HAS_START": False, "HAS_RESETS": False}
    for dtype in ("*fp32", "*fp16"):
        yield "scan_forward", "scan_forward", FORWARD | off | {"SAVE": False}, one, dtype
        yield "scan_backward", "scan_backward", BACKWARD | off | {"HAS_LAST": False}, one, dtype
        yield "scan_segments", "scan_fold", FOLD | {"REVERSE": True}, one, dtype
        for size in (32, 128):
            wide = PART | {"HEAD": size, "BLOCK_P": size, "MAPS": 1, "GROUP": 8}
            yield "decode_attention", "attend_part", wide, four | {"num_stages": 3}, dtype
            merge = MERGE | {"HEAD": size, "BLOCK_E": size, "MAPS": 1, "GROUP": 8}
            yield "decode_attention", "merge_parts", merge, four, dtype
        for name in ("gate_forward", "gate_backward"):
            yield "elementwise", name, {"BLOCK": 1024}, four, dtype
    yield "scan_segments", "scan_chain", CHAIN | {"REVERSE": False}, four, half
    wide = PREFILL | {"HEAD": 128, "BLOCK_P": 128, "HAS_STARTS": False, "HAS_SEGMENTS": False}
    yield "differential", "differential_forward", wide, {"num_warps": 8, "num_stages": 2}, half


def compile_case(case: Case, architecture: int) -> Any:
    """The compiled kernel, with the argument types a launch on usual sizes has."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name, constants, options, dtype = case
    function = kernel(module, name)
    signature, attributes = {}, {}
    for index, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        strided = argument.endswith(("_row", "_step", "_head", "_column", "_segment"))
        number = strided or argument.startswith("start_") or argument in SIZES.split()
        number = number or (argument == "segments" and module == "scan_segments")
        if number:
            signature[argument] = "i32"
        elif argument in NUMBERS:
            signature[argument] = NUMBERS[argument]
        elif argument in OTHERS or (module == "differential" and argument == "starts"):
            signature[argument] = OTHERS.get(argument, "*i64")
        else:
            signature[argument] = dtype if argument in VALUES.split() else "*fp32"
        aligned = strided or argument in ALIGNED
        if signature[argument].startswith("*") or (number and aligned):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=function, signature=signature, constexprs=dict(constants), attrs=attributes
    )
    options = options | {"enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def main(architecture: int, which: str) -> None:
    for case in cases(which == "all"):
        compiled = compile_case(case, architecture)
        assert compiled.asm["cubin"], case
        exchanges = compiled.asm["ptx"].count("shfl.sync")
        if case[1] == "scan_forward":
            assert exchanges == 0, f"{case} exchanges {exchanges} values between threads"
        if case[1] == "scan_backward":
            assert exchanges <= 400, f"{case} exchanges {exchanges} values between threads"
        print(architecture, case[1], case[4], exchanges, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
