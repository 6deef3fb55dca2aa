"""The C++ kernels as functions that ctypes can call, or the reason why there are none."""

from __future__ import annotations

import ctypes
import functools
import logging
import re
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sambay.ops.native import builder
from sambay.ops.tracing import constant_when_traced

# p: a pointer, as an integer address or None; i: an integer; d: a float.
_SCAN = "pii pii p pii pii pppp iiiii ii"  # the order of SCAN_PARAMETERS in selective_scan.h
_CONV = "pii pppp iiii ii"  # the order of CONV_PARAMETERS in causal_conv.cpp
_QUERY = "pii piii piii pi pp iiiii ii"  # QUERY_PARAMETERS in decode_attention.h
_SIGNATURES = {
    "sambay_scan_workspace": ("iiii", ctypes.c_int64),
    "sambay_scan_forward": (_SCAN + "ppp", None),
    "sambay_scan_backward": (_SCAN + "pii pp pppppppp p", None),
    "sambay_scan_step": ("pi pi p pi pi pppp iii ii", None),
    "sambay_conv_workspace": ("iiii", ctypes.c_int64),
    "sambay_conv_forward": (_CONV + "p", None),
    "sambay_conv_backward": (_CONV + "pii pppp", None),
    "sambay_conv_step": ("pi pp pp iii iii", None),
    "sambay_decode_attention": (_QUERY + "di", None),
    "sambay_decode_differential": (_QUERY + "pp ddd i", None),
    "sambay_store_columns": ("pii pii piii piii pi iii i", None),
    "sambay_skinny_linear": ("pi pi pp p iii ii i", None),
    "sambay_grouped_linear": ("pi pi pi pp iiii iii i", None),
    "sambay_mamba_step": ("pi pppp ppp pp p iiiii ii", None),
    "sambay_embed_rows": ("p pi p iii i d", None),
    "sambay_norm_rows": ("pi pp p ii iii dd", None),
    "sambay_gate_rows": ("pi pi p ii i i", None),
    "sambay_add_rows": ("ppp ii d", None),
    "sambay_count_columns": ("pi", None),
    "sambay_slot_places": ("pi pp i", None),
    "sambay_rotary_turns": ("pp pp ii", None),
    "sambay_rotate_heads": ("pii pp p iii i", None),
    "sambay_replay": ("pi", None),
    "sambay_use_openmp": ("p", None),
}
_KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}

_log = logging.getLogger("sambay.ops")
_lock = threading.Lock()
_outcome: ctypes.CDLL | str | None = None


# Traced code cannot compile C++; the answer is one for the whole process.
@constant_when_traced
def why_unavailable() -> str | None:
    """None if the kernels are ready (they are built on the first call), else the reason."""
    global _outcome
    with _lock:
        if _outcome is None:
            try:
                _outcome = _prepare(builder.load())
            except builder.BuildError as error:
                _outcome = str(error)
                _log.warning("no C++ kernels, slower torch code is used instead: %s", error)
    return _outcome if isinstance(_outcome, str) else None


def serves(tensor: Tensor | None) -> str | None:
    """None if the kernels can work on this tensor's device and dtype, else the reason."""
    if tensor is not None:
        if tensor.device.type != "cpu":
            return f"it computes on the CPU, the tensors are on {tensor.device.type}"
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            return f"it takes float32 and bfloat16, not {str(tensor.dtype).removeprefix('torch.')}"
    return why_unavailable()


@functools.cache
def kernels() -> Any:
    """The library of kernels; only to be asked for where `why_unavailable` said None."""
    reason = why_unavailable()
    assert reason is None, reason
    return _outcome


def packed(name: str, arguments: Sequence[Any]) -> list[int]:
    """What `sambay_replay` needs of a call: the address of the packed kernel, and its words."""
    kinds = _SIGNATURES[name][0].replace(" ", "")
    words = [_word(kind, value) for kind, value in zip(kinds, arguments, strict=True)]
    entry = ctypes.cast(getattr(kernels(), f"{name}_packed"), ctypes.c_void_p).value
    assert entry is not None
    return [entry, len(words), *words]


def _word(kind: str, value: Any) -> int:
    if kind == "d":
        return struct.unpack("=q", struct.pack("=d", value))[0]
    return 0 if value is None else int(value)


def rows_of(tensor: Tensor) -> Tensor:
    """The tensor itself if its last axis is contiguous, as kernels expect, else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def sequence(tensor: Tensor) -> tuple[int, int, int]:
    """The address of (B, T, .) values and the strides between rows and between tokens."""
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)


def _prepare(library: ctypes.CDLL) -> ctypes.CDLL:
    for name, (parameters, result) in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = [_KINDS[kind] for kind in parameters.replace(" ", "")]
        function.restype = result
    openmp = _find_openmp()
    if openmp is None:
        _log.info("torch's OpenMP runtime was not found; the C++ kernels start their own threads")
    else:
        library.sambay_use_openmp(ctypes.cast(openmp, ctypes.c_void_p))
    return library


def _find_openmp() -> Any:
    """GOMP_parallel of the OpenMP runtime that torch has loaded, or None.

    It is shared because the threads of a second one would fight with torch's for the cores.
    """
    for path in _mapped_openmp():
        try:
            return ctypes.CDLL(str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
    return None


def _mapped_openmp() -> list[Path]:
    """The OpenMP runtimes in this process, torch's own first."""
    home = Path(torch.__file__).parent
    pattern = re.compile(r"lib(gomp|omp|iomp5)\b.*\.(so|dylib)")
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
            mapped = {line.split(maxsplit=5)[-1].strip() for line in file if "omp" in line}
    except OSError:
        mapped = {str(path) for path in (home / "lib").glob("lib*omp*")}
    found = [Path(name) for name in sorted(mapped) if pattern.match(Path(name).name)]
    # Other packages beside torch bring one too, and name it alike.
    homes = (home, home.with_name("torch.libs"))
    return sorted(found, key=lambda path: not any(one in path.parents for one in homes))


def kernel_names() -> tuple[str, ...]:
    """The kernels that Python calls with tensors' addresses."""
    return tuple(_SIGNATURES)
