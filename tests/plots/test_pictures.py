"""Pictures of every preset are legible: nothing runs off the page and no words cover each other."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

from sambay.errors import ConfigError, MissingPackage
from sambay.plots import architecture, family
from sambay.plots.canvas import Canvas, save
from sambay.plots.curves import Curve, Panel, draw_panels
from sambay.spec import ModelConfig, presets

ODD_PATTERNS = ("M F G C M F G C S F G", "F", "M", "M G", "S S S", "M F 20xC", "31xM F")


def configuration(pattern: str) -> ModelConfig:
    return presets.build("sambay", 4, parametrization="standard", layer_pattern=pattern)


def words_of(canvas: Canvas) -> list[tuple[str, tuple[float, float, float, float]]]:
    """Every text of a drawing with its box in pixels (left, bottom, right, top)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    renderer = FigureCanvasAgg(canvas.figure).get_renderer()
    texts = [text for text in canvas.figure.findobj(Text) if text.get_text() and text.get_visible()]
    on_page = [text for text in texts if text.axes is not None and text.axes.axison is False]
    own = [text for text in on_page if text.axes and text in text.axes.texts]
    return [(text.get_text(), text.get_window_extent(renderer).extents) for text in own]


def assert_legible(canvas: Canvas) -> None:
    words = words_of(canvas)
    assert words
    width, height = canvas.figure.bbox.width, canvas.figure.bbox.height
    for text, (left, bottom, right, top) in words:
        inside = left >= 0 and bottom >= 0 and right <= width and top <= height
        assert inside, f"'{text}' runs off the page"
    for (text, a), (other, b) in itertools.combinations(words, 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, f"'{text}' covers '{other}'"


@pytest.mark.parametrize("depth", [4, 8, pytest.param(16, marks=pytest.mark.slow), 32])
@pytest.mark.parametrize(
    "name", ["sambay", "transformer++", "samba", "swa+yoco", "sambay-aa", "s-gdny"]
)
def test_architecture_of_presets_is_legible(name: str, depth: int) -> None:
    assert_legible(architecture.draw_architecture(presets.build(name, depth), name))


@pytest.mark.parametrize("pattern", ODD_PATTERNS)
def test_architecture_of_any_pattern_is_legible(pattern: str) -> None:
    assert_legible(architecture.draw_architecture(configuration(pattern), "odd"))


def test_architecture_names_every_layer_once() -> None:
    config = presets.build("sambay", 16)
    texts = [text for text, _ in words_of(architecture.draw_architecture(config, "SambaY"))]
    letters = [text for text in texts if text in set("MSFGC")]
    assert letters == [layer.kind.value for layer in config.layers]
    assert texts.count("K, V") == len(architecture._PROMPT_ROWS) - 1
    assert "each prompt token uses 59% of the weights" in texts  # the published 58.8 %


def test_family_shows_every_preset() -> None:
    configs = {family.TITLES[name]: presets.build(name, 16) for name in presets.NAMES}
    drawing = family.draw_family(configs)
    assert_legible(drawing)
    texts = [text for text, _ in words_of(drawing)]
    assert set(family.TITLES.values()) <= set(texts)
    assert "1,024 MiB" in texts  # the published cache of Transformer++ at 32k, 2 bytes per value


def test_same_input_gives_the_same_file(tmp_path: Path) -> None:
    config = presets.build("sambay", 8)
    for suffix in ("png", "svg"):
        first, second = (
            architecture.draw_architecture(config, "x").save(tmp_path / f"{number}.{suffix}")
            for number in (1, 2)
        )
        assert first.read_bytes() == second.read_bytes()


def test_curves_share_colours_and_mark_references() -> None:
    curves = [Curve("a", [1, 2], [3, 4]), Curve("b", [1, 2], [4, 3])]
    panels = [
        Panel("one", "tokens", curves, lines={"gzip": 3.5}),
        Panel("two", "tokens", curves[::-1], x_in_powers_of_two=True, y_from_zero=True, y_top=5.0),
    ]
    first, second = draw_panels(panels, "caption").axes
    colours = [[line.get_color() for line in axes.get_lines()] for axes in (first, second)]
    assert colours[0][:2] == colours[1][1::-1]
    assert [text.get_text() for text in first.texts] == ["gzip"]
    assert second.get_ylim() == (0.0, 5.0)


def test_names_of_lines_stay_within_their_panel() -> None:
    curves = [Curve("SambaY", [0.0, 1.0, 2.0], [3.4, 2.2, 2.0])]
    lines = {"gzip": 2.03, "xz": 1.85}
    figure = draw_panels([Panel("one", "tokens", curves, lines=lines)], "caption")
    figure.canvas.draw()
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == list(lines)
    for text in axes.texts:
        extent = text.get_window_extent()
        assert axes.bbox.y0 <= extent.y0, text
        assert extent.y1 <= axes.bbox.y1, text


def test_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.png or \.svg"):
        save(draw_panels([], ""), tmp_path / "picture.jpg")
    assert list(tmp_path.iterdir()) == []


def test_missing_matplotlib_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackage, match=r"pip install \"sambay\[train\]\""):
        Canvas(1.0, 1.0)
