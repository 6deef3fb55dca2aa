"""General-purpose compressors on the held-out bytes: what a model has to beat."""

from __future__ import annotations

import gzip
import lzma


def bits_per_byte(held_out: bytes, training: bytes) -> dict[str, float]:
    """Compressed bits per byte of `held_out`, by compressor.

    Plain compressors start from nothing, while a model has seen the training text. The last entry
    is therefore what the held-out text adds to xz's output when the training text (within its
    window of 64 MiB) comes first.
    """
    sizes = {
        "gzip -9": len(gzip.compress(held_out, compresslevel=9, mtime=0)),
        "xz -9": _xz(held_out),
        "xz -9, primed": _xz(training + held_out) - _xz(training),
    }
    return {name: 8 * size / len(held_out) for name, size in sizes.items()}


def _xz(text: bytes) -> int:
    return len(lzma.compress(text, preset=9))
