"""The family picture: every preset at one depth, a row each, with what it costs."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from sambay.plots.architecture import COLOURS, LETTER_COLOURS, RECURRENCES
from sambay.plots.canvas import COOL, FAINT, INK, QUIET, Canvas, text_width
from sambay.spec import (
    AttentionVariant,
    GatedMemory,
    LayerKind,
    MemorySource,
    ModelConfig,
    RecurrentKind,
)
from sambay.spec.footprint import cache_bytes, parameter_count, prefill_share

TITLES = {
    "transformer++": "Transformer++",
    "transformer-ls": "TransformerLS",
    "samba": "Samba",
    "swa+yoco": "SWA+YOCO",
    "samba+yoco": "Samba+YOCO",
    "sambay": "SambaY",
    "sambay+da": "SambaY+DA",
    "mambay": "MambaY",
    "sambay-a": "SambaY-A",
    "sambay-aa": "SambaY-AA",
    "sambay-mlp": "SambaY-MLP",
    "sambay-2": "SambaY-2",
    "mambay-2": "MambaY-2",
    "gdny": "GDNY",
    "s-gdny": "S-GDNY",
    "sambay-2+nb": "SambaY-2 (NB)",
    "mambay-2+nb": "MambaY-2 (NB)",
    "s-gdny+gdn": "S-GDNY (GDN)",
    "gdny+gdn": "GDNY (GDN)",
}
CONTEXT = 32_768
# What stands on the tiles of M layers, and of gated memory units that normalise.
RECURRENT_LETTERS = {
    RecurrentKind.MAMBA: "M",
    RecurrentKind.MAMBA2: "M2",
    RecurrentKind.GATED_DELTA: "Δ",
}
NORMALISED = "nG"
WORDS = {
    LayerKind.MAMBA: "recurrent",
    LayerKind.SLIDING: "window",
    LayerKind.FULL: "full",
    LayerKind.GATED_MEMORY: "gated memory",
    LayerKind.CROSS: "cross",
}

_LEFT, _TILE, _PITCH, _ROW = 1.62, 0.31, 0.345, 0.405
_COLUMNS = (
    ("parameters", 0.95),
    ("weights used\nper prompt token", 2.15),
    ("cache at\n32k tokens", 3.30),
)


def draw_family(configs: Mapping[str, ModelConfig]) -> Canvas:
    """The picture of several models of one depth, keyed by their titles.

    G reads the scan output of a Mamba layer unless marked otherwise. The cache counts 2 bytes per
    key and value and 4 per value of recurrent state.
    """
    depth = max(config.num_layers for config in configs.values())
    tiles_end = _LEFT + depth * _PITCH
    width, height = tiles_end + 3.6, 0.75 + len(configs) * _ROW + 0.85
    canvas = Canvas(width, height)
    for heading, offset in _COLUMNS:
        canvas.text(
            tiles_end + offset, height - 0.36, heading, size=8.5, colour=QUIET, align="right"
        )
    for row, (title, config) in enumerate(configs.items()):
        y = height - 0.75 - row * _ROW - _TILE / 2
        if row % 2 == 0:
            canvas.box(0.1, y - _ROW / 2, width - 0.2, _ROW, fill="#f7f8f9", radius=0.05)
        canvas.text(0.25, y, title, size=10, align="left", bold=title == TITLES["sambay"])
        _draw_layers(canvas, config, y)
        cache = cache_bytes(config, 1, CONTEXT, kv_bytes=2)
        values = (
            f"{parameter_count(config) / 1e9:.2f} B",
            f"{prefill_share(config):.0%}",
            f"{cache / 2**20:,.0f} MiB",
        )
        for value, (_, offset) in zip(values, _COLUMNS, strict=True):
            canvas.text(tiles_end + offset, y, value, size=9.5, align="right")
    _draw_legend(canvas, configs.values())
    return canvas


def _draw_layers(canvas: Canvas, config: ModelConfig, y: float) -> None:
    differential = config.attention_variant is AttentionVariant.DIFFERENTIAL
    for layer in config.layers:
        x = _LEFT + layer.index * _PITCH
        ringed = layer.memory_from is not None and config.memory_source is MemorySource.ATTENTION
        canvas.box(
            x, y - _TILE / 2, _TILE, _TILE, fill=COLOURS[layer.kind],
            edge=COOL if ringed else "none", line_width=1.8,
        )  # fmt: skip
        ink = LETTER_COLOURS.get(layer.kind, "#ffffff")
        canvas.text(
            x + _TILE / 2, y - 0.005, _letter(config, layer.kind), size=9.5, bold=True, colour=ink
        )
        if layer.memory_from is not None and config.memory_source is MemorySource.MLP:
            canvas.route([(x + 0.06, y - 0.115), (x + _TILE - 0.06, y - 0.115)], colour=INK)
        if differential and layer.kind in (LayerKind.SLIDING, LayerKind.FULL, LayerKind.CROSS):
            canvas.route([(x + 0.07, y + 0.115), (x + _TILE - 0.07, y + 0.115)], colour=ink)


def _letter(config: ModelConfig, kind: LayerKind) -> str:
    if kind is LayerKind.MAMBA:
        return RECURRENT_LETTERS[config.recurrent_kind]
    if kind is LayerKind.GATED_MEMORY and config.gated_memory is GatedMemory.NORMALISED:
        return NORMALISED
    return kind.value


def _draw_legend(canvas: Canvas, configs: Collection[ModelConfig]) -> None:
    x, y = 0.25, 0.56
    for kind, word in WORDS.items():
        canvas.box(x, y - 0.075, 0.15, 0.15, fill=COLOURS[kind], radius=0.03)
        canvas.text(x + 0.22, y, word, size=8.5, align="left")
        x += 0.22 + text_width(word, 8.5) + 0.22
    x, y = 0.25, 0.26
    used = {config.recurrent_kind for config in configs}
    for kind, letter in RECURRENT_LETTERS.items():
        if kind in used:
            x = _explain(canvas, x, y, letter, RECURRENCES[kind])
    if any(config.gated_memory is GatedMemory.NORMALISED for config in configs):
        x = _explain(canvas, x, y, NORMALISED, "normalised")
    for mark, word in (
        ("over", "differential"),
        ("ring", "memory from attention"),
        ("under", "memory from the MLP"),
    ):
        if mark == "ring":
            canvas.box(x, y - 0.075, 0.15, 0.15, fill="#ffffff", edge=COOL, radius=0.03)
        else:
            line = y + (0.05 if mark == "over" else -0.05)
            canvas.box(x, y - 0.075, 0.15, 0.15, fill=FAINT, radius=0.03)
            canvas.route([(x + 0.035, line), (x + 0.115, line)], colour=INK, line_width=1.6)
        canvas.text(x + 0.22, y, word, size=8.5, align="left")
        x += 0.22 + text_width(word, 8.5) + 0.22


def _explain(canvas: Canvas, x: float, y: float, letter: str, word: str) -> float:
    """Letters of a tile and what they stand for; gives where the next entry begins."""
    canvas.text(x, y, letter, size=8.5, align="left", bold=True)
    x += text_width(letter, 8.5) + 0.1
    canvas.text(x, y, word, size=8.5, align="left")
    return x + text_width(word, 8.5) + 0.22
