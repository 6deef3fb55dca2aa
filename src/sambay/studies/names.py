"""What parametrisations are called in tables and pictures."""

from __future__ import annotations

from sambay.spec import Parametrization

TITLES = {
    Parametrization.STANDARD: "SP",
    Parametrization.MUP: "muP",
    Parametrization.MUP_PLUS_PLUS: "muP++",
}
