"""What a parameter is to a scaling rule; each module declares it for the parameters it owns."""

from __future__ import annotations

import enum


class Role(enum.StrEnum):
    """The part a parameter plays (arXiv 2507.06607, section 3.1: which dimensions grow with width).

    A module's `roles` maps the dotted name of each parameter below it that no inner module declares
    to its role.
    """

    MATRIX = "matrix"  # both dimensions grow with width
    VECTOR = "vector"  # one dimension grows, or none: norms, biases, convolutions, lambdas
    EMBEDDING = "embedding"
    OUTPUT = "output"  # the head, where it is not tied to the embedding
    SSM = "ssm"  # A_log, D and the bias of the time step: float32, never decayed
