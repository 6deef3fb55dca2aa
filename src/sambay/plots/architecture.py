"""The architecture picture: drawn from a `ModelConfig`, whatever its pattern.

One column per layer. From top to bottom: who reads whose memory, the layers, who reads whose keys
and values, what prefill computes for each prompt token, and what is kept between tokens.
"""

from __future__ import annotations

from sambay.plots.canvas import (
    COOL,
    COOL_LIGHT,
    COOL_MIDDLE,
    FAINT,
    INK,
    QUIET,
    WARM,
    WARM_LIGHT,
    Canvas,
    text_width,
)  # fmt: skip
from sambay.spec import (
    GatedMemory,
    LayerKind,
    LayerSpec,
    MemorySource,
    ModelConfig,
    RecurrentKind,
    prefill_split,
)
from sambay.spec.footprint import prefill_share

COLOURS = {
    LayerKind.MAMBA: WARM,
    LayerKind.SLIDING: COOL_LIGHT,
    LayerKind.FULL: COOL,
    LayerKind.GATED_MEMORY: WARM_LIGHT,
    LayerKind.CROSS: COOL_MIDDLE,
}
LETTER_COLOURS = {
    LayerKind.SLIDING: COOL,
    LayerKind.GATED_MEMORY: INK,
}
RECURRENCES = {
    RecurrentKind.MAMBA: "Mamba-1",
    RecurrentKind.MAMBA2: "Mamba-2",
    RecurrentKind.GATED_DELTA: "Gated DeltaNet",
}
SHORT_RECURRENCES = {
    RecurrentKind.MAMBA: "Mamba",
    RecurrentKind.MAMBA2: "Mamba-2",
    RecurrentKind.GATED_DELTA: "GDN",
}
SHORT_NAMES = {
    LayerKind.SLIDING: "window",
    LayerKind.FULL: "full",
    LayerKind.GATED_MEMORY: "GMU",
    LayerKind.CROSS: "cross",
}
MEMORY_NAMES = {
    MemorySource.ATTENTION: "memory: the heads of the full attention layer",
    MemorySource.MLP: "memory: the value half of the full layer's MLP",
}

_LEFT, _RIGHT = 1.85, 0.55  # margins for the row labels and the outgoing arrow
_TILE_HEIGHT = 0.56
_CELL_HEIGHT, _CELL_PITCH = 0.17, 0.205
_PROMPT_ROWS = ("token 1", "2", "3", "⋮", "n − 1", "last token n")


class _Picture:
    """Positions of everything, from the top down."""

    def __init__(self, config: ModelConfig, title: str) -> None:
        self.config, self.title = config, title
        self.share = prefill_share(config)
        self.layers = config.layers
        self.split = prefill_split(self.layers)
        self.pitch = min(0.95, max(0.36, 9.6 / config.num_layers))
        self.tile = self.pitch - min(0.10, 0.13 * self.pitch)
        self.memory_readers = [layer for layer in self.layers if layer.memory_from is not None]
        self.kv_readers = [layer for layer in self.layers if layer.kv_from is not None]
        width = _LEFT + max(config.num_layers * self.pitch, 8.1) + _RIGHT
        self.width = width
        down = 0.82  # title
        down += 0.10 + (0.52 if self.memory_readers else 0.12)
        self.tiles_at = down + _TILE_HEIGHT
        down = self.tiles_at + 0.28 + (0.52 if self.kv_readers else 0.0)
        self.grid_at = down + 0.20
        self.decode_at = self.grid_at + len(_PROMPT_ROWS) * _CELL_PITCH + 0.14
        self.kept_at = self.decode_at + _CELL_PITCH + 0.22
        self.legend_at = self.kept_at + 0.98
        self.height = self.legend_at + 0.42
        self.canvas = Canvas(width, self.height)

    def x(self, index: int) -> float:
        """The middle of a layer's column."""
        return _LEFT + (index + 0.5) * self.pitch

    def y(self, down: float) -> float:
        """A height measured from the top."""
        return self.height - down

    def draw(self) -> Canvas:
        self._title()
        self._decoders()
        self._memory()
        self._layers()
        self._keys_and_values()
        self._prefill()
        self._decode()
        self._kept()
        self._legend()
        return self.canvas

    def _title(self) -> None:
        self.canvas.text(0.25, self.y(0.32), self.title, size=17, bold=True, align="left")
        self.canvas.text(
            self.width - 0.25, self.y(0.32), self.config.layer_pattern,
            size=11, mono=True, align="right", colour=QUIET,
        )  # fmt: skip

    def _decoders(self) -> None:
        last = self.config.num_layers - 1
        if self.split == last:
            return
        for first, end, label in (
            (0, self.split, "self-decoder"),
            (self.split + 1, last, "cross-decoder"),
        ):
            left, right = self.x(first) - self.tile / 2, self.x(end) + self.tile / 2
            y = self.y(0.82)
            self.canvas.route([(left, y), (right, y)], colour=QUIET, line_width=1.2)
            self.canvas.text((left + right) / 2, y + 0.13, label, size=10, colour=INK)

    def _memory(self) -> None:
        top = self.y(self.tiles_at - _TILE_HEIGHT)
        bus = top + 0.34
        for reader in self.memory_readers:
            assert reader.memory_from is not None
            self.canvas.route(
                [(self.x(reader.memory_from), top), (self.x(reader.memory_from), bus),
                 (self.x(reader.index), bus), (self.x(reader.index), top + 0.02)],
                colour=WARM, arrow=True,
            )  # fmt: skip
        sources = {layer.memory_from for layer in self.memory_readers}
        words = MEMORY_NAMES.get(
            self.config.memory_source,
            f"memory: the scan output of this {self._short_name(LayerKind.MAMBA)} layer",
        )
        self._bus_labels(sources, words, "memory", (bus, bus + 0.11), WARM)

    def _layers(self) -> None:
        y = self.y(self.tiles_at)
        middle = y + _TILE_HEIGHT / 2
        start, end = _LEFT - 0.28, self.x(self.config.num_layers - 1) + self.pitch / 2 + 0.24
        self.canvas.route([(start, middle), (end, middle)], colour=QUIET, arrow=True)
        self.canvas.text(start - 0.08, middle, "tokens", align="right")
        for layer in self.layers:
            x, colour = self.x(layer.index), COLOURS[layer.kind]
            self.canvas.box(x - self.tile / 2, y, self.tile, _TILE_HEIGHT, fill=colour)
            ink = LETTER_COLOURS.get(layer.kind, "#ffffff")
            self.canvas.text(x, middle + 0.03, layer.kind.value, size=15, bold=True, colour=ink)
            self.canvas.text(x, y + 0.075, str(layer.index), size=6.5, colour=ink)
            if self.pitch > 0.5:
                self.canvas.text(x, y - 0.11, self._short_name(layer.kind), size=8.5)

    def _short_name(self, kind: LayerKind) -> str:
        if kind is LayerKind.MAMBA:
            return SHORT_RECURRENCES[self.config.recurrent_kind]
        if kind is LayerKind.GATED_MEMORY and self.config.gated_memory is GatedMemory.NORMALISED:
            return "nGMU"
        return SHORT_NAMES[kind]

    def _keys_and_values(self) -> None:
        bottom = self.y(self.tiles_at + 0.22)
        bus = bottom - 0.30
        for reader in self.kv_readers:
            assert reader.kv_from is not None
            self.canvas.route(
                [(self.x(reader.kv_from), bottom), (self.x(reader.kv_from), bus),
                 (self.x(reader.index), bus), (self.x(reader.index), bottom - 0.02)],
                colour=COOL, arrow=True,
            )  # fmt: skip
        sources = {layer.kv_from for layer in self.kv_readers}
        words = "keys and values of the full attention layer"
        self._bus_labels(sources, words, "K, V", (bus, bus - 0.12), COOL)

    def _bus_labels(
        self, sources: set[int | None], words: str, short: str, y: tuple[float, float], colour: str
    ) -> None:
        """Name what a bus carries: in words left of its only source if they fit, else in short."""
        for source in sources:
            assert source is not None
            x = self.x(source)
            if len(sources) == 1 and x - 0.14 - text_width(words, 9) > 0.25:
                self.canvas.text(x - 0.14, y[0], words, size=9, colour=colour, align="right")
            else:
                self.canvas.text(x + 0.12, y[1], short, size=8, colour=colour, align="left")

    def _prefill(self) -> None:
        self._heading(self.grid_at, "Prefill")
        for row, label in enumerate(_PROMPT_ROWS):
            down = self.grid_at + row * _CELL_PITCH
            is_last = row == len(_PROMPT_ROWS) - 1
            self._row_label(down, label, bold=is_last)
            for layer in self.layers:
                if is_last or layer.index < self.split:
                    self._cell(layer, down, 1.0)
                elif layer.index == self.split:
                    self._cell(
                        layer, down, 0.25, "state" if layer.kind is LayerKind.MAMBA else "K, V"
                    )
        if self.split < self.config.num_layers - 1:
            left = self.x(self.split + 1) - self.tile / 2
            right = self.x(self.config.num_layers - 1) + self.tile / 2
            rows = len(_PROMPT_ROWS) - 1
            y = self.y(self.grid_at + (rows - 1) * _CELL_PITCH + _CELL_HEIGHT)
            height = (rows - 1) * _CELL_PITCH + _CELL_HEIGHT
            self.canvas.box(left, y, right - left, height, fill="#f7f8f9", edge=FAINT)
            share = f"each prompt token uses {self.share:.0%} of the weights"
            inside = right - left > text_width(share, 9) + 0.3
            x, y = (left + right) / 2, y + height / 2
            if inside:
                self.canvas.text(x, y + 0.13, "never computed", size=10, bold=True)
                self.canvas.text(x, y - 0.11, share, size=9)
            else:
                self.canvas.text(x, y, "never\ncomputed", size=10, bold=True)
                if right + text_width(share, 9) + 0.4 < self.width:
                    self.canvas.text(right + 0.15, y, share, size=9, align="left")

    def _decode(self) -> None:
        self._heading(self.decode_at, "Decode")
        self._row_label(self.decode_at, "new token")
        for layer in self.layers:
            self._cell(layer, self.decode_at, 1.0)

    def _kept(self) -> None:
        self._heading(self.kept_at, "Cache")
        slices = {LayerKind.MAMBA: 1, LayerKind.SLIDING: 4, LayerKind.FULL: 10}
        for layer in self.layers:
            count = slices.get(layer.kind, 0)
            x, width = self.x(layer.index), self.tile * 0.66
            for number in range(count):
                y = self.y(self.kept_at + 0.10 + number * 0.075)
                fade = 1.0 - number / count if layer.kind is LayerKind.FULL else 1.0
                self.canvas.box(
                    x - width / 2, y, width, 0.05, fill=COLOURS[layer.kind], radius=0.02, alpha=fade
                )
        for kind, down, label in (
            (LayerKind.MAMBA, 0.34, "fixed\nstate"),
            (LayerKind.SLIDING, 0.62, f"last {self.config.window}\ntokens"),
        ):
            first = next((layer for layer in self.layers if layer.kind is kind), None)
            if first is not None:
                self.canvas.text(
                    self.x(first.index),
                    self.y(self.kept_at + down),
                    label,
                    size=8,
                )
        full = [layer for layer in self.layers if layer.kind is LayerKind.FULL]
        if len(full) == 1:
            x, y, words = (
                self.x(full[0].index),
                self.y(self.kept_at + 0.66),
                "the only one that grows",
            )
            beside = self.tile * 0.5
            if x + beside + text_width(words, 8) < self.width - 0.1:
                self.canvas.text(x + beside, y, words, size=8, align="left")
            else:
                self.canvas.text(x - beside, y, words, size=8, align="right")
        if self.split < self.config.num_layers - 1:
            middle = (self.x(self.split + 1) + self.x(self.config.num_layers - 1)) / 2
            self.canvas.text(
                middle, self.y(self.kept_at + _CELL_HEIGHT / 2), "nothing", colour=QUIET
            )

    def _legend(self) -> None:
        words = {
            LayerKind.MAMBA: RECURRENCES[self.config.recurrent_kind],
            LayerKind.SLIDING: "sliding window attention",
            LayerKind.FULL: "full attention",
            LayerKind.GATED_MEMORY: (
                "nGMU"
                if self.config.gated_memory is GatedMemory.NORMALISED
                else "gated memory unit"
            ),
            LayerKind.CROSS: "cross attention",
        }
        used = [kind for kind in LayerKind if any(layer.kind is kind for layer in self.layers)]
        x, y = 0.25, self.y(self.legend_at + 0.12)
        for kind in used:
            self.canvas.box(x, y - 0.075, 0.15, 0.15, fill=COLOURS[kind], radius=0.03)
            label = f"{kind.value}  {words[kind]}"
            self.canvas.text(x + 0.22, y, label, size=9, align="left")
            x += 0.22 + text_width(label, 9) + 0.28
        self.canvas.text(
            self.width - 0.25, y, "every layer also has an MLP", size=9, align="right", colour=QUIET
        )

    def _heading(self, down: float, label: str) -> None:
        y = self.y(down + _CELL_HEIGHT / 2)
        self.canvas.text(0.25, y, label, size=11, bold=True, align="left")

    def _row_label(self, down: float, label: str, *, bold: bool = False) -> None:
        y = self.y(down + _CELL_HEIGHT / 2)
        self.canvas.text(_LEFT - 0.08, y, label, size=8.5, align="right", bold=bold)

    def _cell(self, layer: LayerSpec, down: float, alpha: float, label: str = "") -> None:
        x, y = self.x(layer.index), self.y(down + _CELL_HEIGHT)
        self.canvas.box(
            x - self.tile / 2, y, self.tile, _CELL_HEIGHT,
            fill=COLOURS[layer.kind], radius=0.035, alpha=alpha,
        )  # fmt: skip
        if label:
            self.canvas.text(x, y + _CELL_HEIGHT / 2, label, size=7, colour=COLOURS[layer.kind])


def draw_architecture(config: ModelConfig, title: str) -> Canvas:
    """The picture of a model under a title, ready to be saved."""
    return _Picture(config, title).draw()
