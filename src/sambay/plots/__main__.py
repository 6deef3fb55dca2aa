"""Draws docs/images: `python -m sambay.plots --out docs/images`."""

from __future__ import annotations

import argparse
from pathlib import Path

from sambay.plots.architecture import draw_architecture
from sambay.plots.family import TITLES, draw_family
from sambay.spec import RecurrentNorm, presets

DEPTH = 16


def main() -> None:
    """Draw SambaY and its family as PNG and SVG, and print the paths."""
    parser = argparse.ArgumentParser(prog="python -m sambay.plots", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    out: Path = parser.parse_args().out
    members = {name: presets.build(name, DEPTH) for name in presets.NAMES}
    # Another place of a norm changes nothing that this picture shows.
    family = {
        TITLES[name]: config
        for name, config in members.items()
        if config.recurrent_norm is RecurrentNorm.AFTER_GATE
    }
    pictures = {
        "architecture": draw_architecture(family[TITLES["sambay"]], TITLES["sambay"]),
        "family": draw_family(family),
    }
    for name, picture in pictures.items():
        for suffix in (".png", ".svg"):
            print(picture.save(out / f"{name}{suffix}"))


if __name__ == "__main__":
    main()
