"""Which samples a training step reads: arithmetic of (seed, step), with no state to save.

Samples are numbered on one endless line of epochs. Step n takes positions n*G to n*G + G - 1;
position p is sample permutation(seed, epoch)(p mod N) of epoch p div N. The permutation is a keyed
Feistel network on the next power of four >= N; results >= N are fed in again until they are below
(cycle walking), which keeps it a bijection and needs no table (Black and Rogaway, "Ciphers with
Arbitrary Finite Domains", CT-RSA 2002).
"""

from __future__ import annotations

import numpy as np

from sambay.errors import DataError

_ROUNDS = 8
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def sample_indices(seed: int, step: int, global_batch_size: int, num_samples: int) -> np.ndarray:
    """The samples of one global batch, int64 of shape (global_batch_size,).

    Within an epoch of `num_samples` every sample occurs once; each epoch has its own order. A
    batch may cross from one epoch into the next. The result depends on nothing but the arguments,
    so any division of the batch over processes, and any restart, sees the same samples.

    Raises:
        DataError: no samples at all, or a batch size below 1.
    """
    if num_samples < 1:
        raise DataError("the split has no samples; prepare more text or use a shorter sequence")
    if global_batch_size < 1:
        raise DataError(f"global_batch_size is {global_batch_size}; it must be at least 1")
    if step < 0:
        raise DataError(f"step is {step}; it must be at least 0")
    first = step * global_batch_size
    # Python's integers cannot overflow; only what is below num_samples goes into the arrays.
    epoch, offset = divmod(first, num_samples)
    positions = offset + np.arange(global_batch_size, dtype=np.uint64)
    epochs = np.uint64(epoch & _MASK) + positions // np.uint64(num_samples)
    return _permute(seed, epochs, positions % np.uint64(num_samples), num_samples)


def samples_at(seed: int, positions: np.ndarray, num_samples: int) -> np.ndarray:
    """The samples at these positions (int64, any order) of the endless line; int64.

    `sample_indices` is this for the positions of one step.

    Raises:
        DataError: no samples at all.
    """
    if num_samples < 1:
        raise DataError("the split has no samples; prepare more text or use a shorter sequence")
    epochs, places = np.divmod(np.asarray(positions, np.uint64), np.uint64(num_samples))
    return _permute(seed, epochs, places, num_samples)


def source_seed(seed: int, source: int) -> int:
    """The seed of one source of a mixture; that of the first is `seed` itself.

    Without it, sources of the same size would be read in the same order.
    """
    return seed if source == 0 else int(_mix(_mix(np.uint64(seed & _MASK)) ^ np.uint64(source)))


def _permute(seed: int, epochs: np.ndarray, positions: np.ndarray, size: int) -> np.ndarray:
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    key = _mix(_mix(np.uint64(seed & _MASK)) ^ epochs)
    keys = [_mix(key + np.uint64(_GOLDEN * number & _MASK)) for number in range(1, _ROUNDS + 1)]
    values = _feistel(positions, keys, half)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        values[outside] = _feistel(values[outside], [key[outside] for key in keys], half)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _feistel(values: np.ndarray, keys: list[np.ndarray], half: int) -> np.ndarray:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        # The top bits of the mixed word are its best.
        left, right = right, left ^ (_mix(right ^ key) >> np.uint64(64 - half))
    return left << bits | right


def _mix(values: np.ndarray | np.uint64) -> np.ndarray:
    """A bijection of 64-bit words in which every bit depends on every other (splitmix64's)."""
    values = np.asarray(values, np.uint64)
    with np.errstate(over="ignore"):
        values = values + np.uint64(_GOLDEN)
        values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
