"""Parameters of which a process holds a part only, where several compute one layer together."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def own_part(tensor: Tensor) -> Tensor:
    """The rows or columns this process holds; the tensor itself where nothing is split.

    What all processes hold alike, each of them reads for heads or channels of its own, so that its
    gradient is the sum of theirs.
    """
    if not dist.is_available() or not dist.is_initialized():
        return tensor
    # Imported only by those who may need it, and asked by type, which compiled code understands.
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(tensor, DTensor):
        return tensor
    gradient = [Partial() if place.is_replicate() else place for place in tensor.placements]
    return tensor.to_local(grad_placements=gradient)
