"""The matrices that end a mixer or an MLP."""

from __future__ import annotations

from torch import nn


class ResidualProjection(nn.Linear):
    """A linear map whose output is added to the residual stream.

    It computes what `nn.Linear` does. It is a class of its own because initialisation treats these
    matrices differently (arXiv 2507.06607, table 6).
    """
