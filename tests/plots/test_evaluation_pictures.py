"""Pictures of evaluations show every point where it is, the paper's told apart from one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sambay.errors import ConfigError
from sambay.evals.phonebook.comparison import (
    SweepPoint,
    draw_depths,
    draw_lengths,
    draw_windows,
    sweep,
)
from sambay.evals.result import Result
from sambay.evals.statistics import Metric
from sambay.evals.suites.phonebook import PhonebookSuite
from sambay.plots.canvas import save
from sambay.plots.evaluation import EvaluationChart, EvaluationCurve, draw_evaluation

PART = {"from": 0.0, "to": 0.5, "accuracy": 0.75, "stderr": 0.1, "count": 16}


def result_of(
    name: str,
    window: int | None,
    accuracies: dict[int, float],
    pattern: str | None = "M F",
    **options: Any,
) -> Result:
    suite = PhonebookSuite(pairs=tuple(accuracies), **options)
    facts = {"group_deviation": 0.05, "by_depth": [PART, {**PART, "from": 0.5, "to": 1.0}]}
    model = {"name": name, "window": window}
    return Result(
        "phonebook",
        suite.settings,
        "0",
        model if pattern is None else model | {"layer_pattern": pattern},
        {f"accuracy@{pairs}": Metric(value, 0.04, 128) for pairs, value in accuracies.items()},
        {"lengths": {str(pairs): facts for pairs in accuracies}},
    )


def lines_of(figure: Any) -> dict[str, tuple[list[float], list[float], str]]:
    """The points of every curve, by its name in the legend: x, y, and the fill of the markers."""
    found = {}
    for container in figure.axes[0].containers:
        line = container.lines[0]
        x, y = (list(values) for values in line.get_data())
        found[container.get_label()] = (x, y, line.get_markerfacecolor())
    return found


def test_results_of_one_architecture_are_one_curve_over_the_window() -> None:
    results = [
        result_of("mine-w128", 128, {1850: 0.5}),
        result_of("mine-w64", 64, {1850: 0.25}),
        result_of("other", 64, {1850: 0.125}, "S F"),
        result_of("full", None, {1850: 0.75}, "F"),
    ]
    rows = sweep(results, published=False)
    assert rows[0] == SweepPoint("mine", 128, 1850, 0.5, 0.05, 0.04, False)
    assert [row.label for row in rows] == ["mine", "mine", "other", "full"]
    figure = draw_windows(results)
    curves = lines_of(figure)
    x, y, fill = curves["mine"]
    assert x == pytest.approx([64, 128], rel=0.1)
    assert y == [25, 50]
    assert curves["SambaY, paper"][1] == [78.13, 92.19]
    assert curves["SWA+YOCO, paper"][1] == pytest.approx([13.28, 37.5, 30.47, 13.28, 16.41, 8.59])
    assert {curves[name][2] == fill for name in ("SambaY, paper", "SWA+YOCO, paper")} == {False}
    names = {text.get_text() for text in figure.axes[0].texts}
    assert names == {"full", "Transformer++, paper"}


def test_models_of_which_nothing_is_known_are_not_joined() -> None:
    results = [result_of(name, None, {1850: 0.5}, None) for name in ("model-a", "model-b")]
    assert [row.label for row in sweep(results, published=False)] == ["model-a", "model-b"]
    numbered = [result_of(f"new 1.{window}", window, {1850: 0.5}) for window in (64, 128)]
    assert {row.label for row in sweep(numbered, published=False)} == {"new"}
    again = [result_of("mine", window, {1850: 0.5}, "M F") for window in (1, 2)]
    again.append(result_of("mine", 1, {1850: 0.5}, "S F"))
    labels = [row.label for row in sweep(again, published=False)]
    assert labels == ["mine", "mine", "mine (2)"]
    named = sweep(again, labels=["a", "b", "c"], published=False)
    assert [row.label for row in named] == ["a", "b", "c"]


def test_lengths_stand_beside_those_of_the_paper_where_they_are_the_same() -> None:
    curves = lines_of(draw_lengths([result_of("mine", 8, {1850: 0.5, 7400: 0.25})]))
    assert curves["mine"][1] == [50, 25]
    assert curves["SambaY, paper"][1] == pytest.approx([92.19, 96.09, 0])
    assert "SWA+YOCO, paper" not in curves  # known at one length only
    assert len(curves) == 6
    short = lines_of(draw_lengths([result_of("mine", 8, {10: 0.5}), result_of("mine", 8, {20: 1})]))
    assert sorted(short) == ["mine", "mine (2)"]


def test_depths_have_intervals_with_a_width() -> None:
    result = result_of("mine", 8, {10: 1.0})
    result.details["lengths"]["10"]["by_depth"][1]["accuracy"] = 1.0
    figure = draw_depths(result)
    assert lines_of(figure)["10 entries"][:2] == ([25, 75], [75, 100])
    (bars,) = figure.axes[0].containers[0].lines[2]
    ends = [segment[:, 1] for segment in bars.get_segments()]
    assert ends[1][0] == pytest.approx(100 * 16 / 17)  # Wilson, one standard error, 16 of 16
    assert ends[1][1] == 100
    assert ends[0][0] < 75 < ends[0][1]


def test_results_that_asked_something_else_are_refused() -> None:
    mine = result_of("mine", 8, {10: 1.0})
    with pytest.raises(ConfigError, match="seed was 42 in one result and 1 in another"):
        sweep([mine, result_of("mine", 8, {10: 1.0}, seed=1)])
    with pytest.raises(ConfigError, match="no results"):
        sweep([])
    with pytest.raises(ConfigError, match="a result of 'ruler'"):
        sweep([Result("ruler", {}, "0", {}, {})])
    with pytest.raises(ConfigError, match="1 labels for 2 results"):
        sweep([mine, mine], labels=["a"])
    with pytest.raises(ConfigError, match="pairs = 20 in common"):
        draw_windows([mine], pairs=20)
    with pytest.raises(ConfigError, match="a length in common"):
        draw_windows([mine, result_of("mine", 8, {20: 1.0})])


def test_nothing_leaves_the_page_and_the_same_input_gives_the_same_file(tmp_path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    curves = [
        EvaluationCurve(f"a model with a long name {n}", [1, 2], [0, 1], [-1, 0.9], [0.1, 2], n > 3)
        for n in range(7)
    ]
    content = EvaluationChart(
        "title", "x", curves, {1: "1", 2: "2"}, lines=[("one line", 0.5), ("another", 0.51)]
    )
    files = []
    for name in ("a.png", "b.png"):
        figure = draw_evaluation(content, "caption")
        files.append(save(figure, tmp_path / name).read_bytes())
    assert files[0] == files[1]
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = {}
    for text in figure.findobj(Text):
        if text.get_text() and text.get_visible():
            boxes[text.get_text()] = text.get_window_extent(renderer)
    assert len([name for name in boxes if name.startswith("a model")]) == 7
    for name, box in boxes.items():
        assert box.x0 >= 0, name
        assert box.x1 <= figure.bbox.width, name
        assert box.y1 <= figure.bbox.height, name
    assert not boxes["one line"].overlaps(boxes["another"])
    assert not boxes["title"].overlaps(boxes["a model with a long name 6, paper"])
