"""Parameters of which a process holds a part only, where several compute one layer together."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def own_part(tensor: Tensor) -> Tensor:
    """The rows or columns this process holds; the tensor itself where nothing is split.

    What all processes hold alike, each of them reads for heads or channels of its own, so that its
    gradient is the sum of theirs.
    """
    split: Any = tensor
    if not hasattr(split, "to_local"):
        return tensor
    # torch.distributed is not needed by those who never split anything.
    from torch.distributed.tensor import Partial

    gradient = [Partial() if place.is_replicate() else place for place in split.placements]
    return split.to_local(grad_placements=gradient)
