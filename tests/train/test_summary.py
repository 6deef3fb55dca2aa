"""The page of a run: well-formed, alone, with the numbers of metrics.jsonl, whatever is missing."""

from __future__ import annotations

import base64
import html
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sambay.cli.main import main
from sambay.errors import ConfigError, DataError
from sambay.plots.run_charts import Chart, Series, draw_chart, short, thinned
from sambay.train.config import LoggingConfig, RunConfig
from sambay.train.loop import train
from sambay.train.metrics import read_metrics
from sambay.train.summary import charts, summary_page, write_summary
from sambay.train.summary_page import render

MakeConfig = Callable[..., RunConfig]
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Reader(HTMLParser):
    """Reads a page strictly: every element is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.values: list[float] = []
        self.images: list[dict[str, str | None]] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "data":
            self.values.append(float(found["value"] or "missing"))
        if tag == "img":
            self.images.append(found)
        self.references += [found[name] or "" for name in ("src", "href") if name in found]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def write_run(
    run_dir: Path, config: RunConfig, lines: list[dict[str, Any]], tail: str = ""
) -> Path:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.json").write_text(json.dumps(config.to_dict()))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run_dir / "metrics.jsonl").write_text(text + tail)
    return run_dir


def some_lines(count: int) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(1, count + 1):
        line = {
            "step": step, "tokens": 10 * step, "seconds": 0.5 * step, "loss": 3 + 5 / step,
            "learning_rate": 1e-3 / step, "gradient_norm": 1 + 30 / step,
            "gradient_norm/matrix": 1 + 20 / step, "tokens_per_second": 100.0 + step % 3,
        }  # fmt: skip
        if step % 4 == 0:
            line |= {"validation_loss": 3.1 + 4.123456789 / step, "validation_bits_per_byte": 1.5}
        lines.append(line)
    return lines


def names_of(found: list[Chart]) -> list[str]:
    return [chart.title for chart in found]


def test_the_page_of_a_real_run(make_config: MakeConfig, tmp_path: Path) -> None:
    run_dir = tmp_path / "my <run> & more"
    config = make_config(steps=6, logging=LoggingConfig(peak_flops=1e12))
    train(config, run_dir)
    path = write_summary(run_dir)
    assert path == run_dir / "summary.html"
    page = Reader(path.read_text())
    lines = read_metrics(run_dir)
    assert "my <run> & more" in page.text
    assert "finished: 6 steps" in page.text
    for value in (
        lines[-1]["loss"], lines[-1]["seconds"], lines[-1]["validation_bits_per_byte"],
        lines[3]["validation_loss"], lines[5]["validation_loss"],
    ):  # fmt: skip
        assert value in page.values
    environment = json.loads((run_dir / "environment.json").read_text())
    for fact in (config.model.layer_pattern, environment["run_id"], "1e+12 FLOP/s", "seed 5"):
        assert fact in page.text
    for reference in page.references:
        assert reference.startswith("data:image/svg+xml;base64,")
    expected = ["Loss", "Learning rate", "Gradient norm before clipping", "Speed"]
    expected += ["Model FLOPs utilisation (MFU)", "Memory"]
    assert [image["alt"] for image in page.images] == [f"{name} by step" for name in expected]
    for image in page.images:
        content = base64.b64decode((image["src"] or "").partition(",")[2])
        assert ElementTree.fromstring(content).tag.endswith("svg")
    before = path.read_bytes()
    assert write_summary(run_dir).read_bytes() == before  # made again, the same


def test_two_files_suffice_and_curves_hold_their_numbers(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    lines = some_lines(20)
    page = summary_page(write_run(tmp_path, make_config(steps=40), lines))
    assert page.subtitle == "step 20 of 40"
    assert ("environment", "not recorded") in page.description
    assert page.starts == []
    assert page.notes == []
    loss, rate, norm, speed = page.charts
    training, validation = loss.series
    assert (training.name, list(training.values)) == ("training", [line["loss"] for line in lines])
    assert list(validation.steps) == [4, 8, 12, 16, 20]
    assert list(validation.values) == [3.1 + 4.123456789 / step for step in validation.steps]
    assert [series.name for series in norm.series] == ["matrix", "all"]
    assert norm.line == (1.0, "clipped to 1")
    assert list(rate.series[0].values) == [line["learning_rate"] for line in lines]
    assert speed.from_zero
    head, rows = page.evaluations
    assert list(head) == ["step", "tokens", "validation_loss", "validation_bits_per_byte"]
    assert [row[2] for row in rows] == list(validation.values)
    facts = {fact.name: fact.value for fact in page.facts}
    assert facts["tokens/s"] == 101
    assert facts["training loss"] == lines[-1]["loss"]


def test_what_a_mixture_on_gpus_measures_is_drawn(make_config: MakeConfig) -> None:
    lines = some_lines(8)
    for line in lines:
        line |= {"learning_rate/matrix": 1e-4, "mfu": 0.4, "memory/host": 2**30}
        line |= {"memory/device_peak": 3 * 2**30, "data/web/share": 0.7, "data/web/tokens": 7}
        if line["step"] > 5:
            line["skipped"] = 2
    lines[7] |= {"validation/web/64/loss": 2.5, "validation/web/64/bits_per_byte": 1.0}
    found = {chart.title: chart for chart in charts(lines, make_config())}
    values = {
        title: {series.name: series.values[-1] for series in chart.series}
        for title, chart in found.items()
    }
    assert values["Memory"] == {"GPU, most so far": 3.0, "host": 1.0}
    assert values["Share of the data so far"] == {"web": 70.0}
    assert values["Model FLOPs utilisation (MFU)"] == {"MFU": 40.0}
    assert values["Validation loss by set and length"] == {"web/64": 2.5}
    assert set(values["Learning rate"]) == {"all others", "matrix"}
    assert list(found["Skipped steps so far"].series[0].values) == [0] * 5 + [2] * 3
    for chart in found.values():
        assert draw_chart(chart).axes[0].lines


def test_a_long_jumping_curve_is_drawn_with_its_mean(make_config: MakeConfig) -> None:
    lines = [{"step": step, "loss": 2.0 + step % 2} for step in range(1, 301)]
    background, mean = charts(lines, make_config())[0].series
    assert background.style == "thin"
    assert list(background.values) == [line["loss"] for line in lines]
    assert mean.name == "training, mean of 11"
    assert mean.values[100] == pytest.approx(sum(background.values[95:106]) / 11)
    assert mean.values[0] == pytest.approx(sum(background.values[:6]) / 6)


def test_damaged_lines_and_missing_numbers_are_left_out_visibly(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    lines = some_lines(4)
    lines[2]["loss"] = None
    lines[3]["gradient_norm"] = "a text"
    run_dir = write_run(tmp_path, make_config(), lines, tail='{"broken\n{"step": 6, "lo')
    text = write_summary(run_dir).read_text()
    assert "lines that cannot be read were left out: 5" in Reader(text).text
    loss = summary_page(run_dir).charts[0].series[0]
    assert list(loss.steps) == [1, 2, 4]
    (run_dir / "environment.json").write_text("[]")
    assert "environment.json is damaged" in Reader(write_summary(run_dir).read_text()).text


def test_a_configuration_of_another_version_is_shown_as_it_is(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    run_dir = write_run(tmp_path, make_config(), some_lines(3))
    values = make_config().to_dict() | {"format_version": 99, "from_the_future": "<b>"}
    (run_dir / "config.json").write_text(json.dumps(values))
    page = Reader(write_summary(run_dir).read_text())
    assert "not understood, so sizes are missing" in page.text
    assert '"from_the_future": "<b>"' in page.text
    assert len(page.images) == 4


def test_directories_without_a_run_are_named(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        write_summary(tmp_path)
    write_run(tmp_path, make_config(), [], tail='{"step": 1')
    with pytest.raises(DataError, match=r"metrics\.jsonl holds no measurements"):
        write_summary(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"config\.json"):
        write_summary(tmp_path)
    assert not (tmp_path / "summary.html").exists()


def test_without_matplotlib_the_page_has_tables(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    lines = some_lines(50)
    page = Reader(write_summary(write_run(tmp_path, make_config(), lines)).read_text())
    assert page.images == []
    assert 'pip install "sambay[train]"' in page.text
    for line in (lines[0], lines[-1]):
        for name in ("loss", "learning_rate", "gradient_norm/matrix"):
            assert line[name] in page.values


def test_one_line_is_enough(make_config: MakeConfig, tmp_path: Path) -> None:
    page = Reader(write_summary(write_run(tmp_path, make_config(), some_lines(1))).read_text())
    assert len(page.images) == 4


def test_texts_are_escaped(make_config: MakeConfig, tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 2.0, "validation/<i>/8/loss": 3.0, "validation_loss": 3.0}]
    run_dir = write_run(tmp_path, make_config(), lines)
    start = {"time": "<script>", "command": "train 'a' & \"b\""}
    environment = {"run_id": "<x>", "starts": [start]}
    (run_dir / "environment.json").write_text(json.dumps(environment))
    text = render(summary_page(run_dir))
    page = Reader(text)
    for raw in ("<script>", "<x>", "<i>", "train 'a' & \"b\""):
        assert raw in page.text
        assert raw not in text.replace(html.escape(raw), "")


def test_thinned_curves_keep_their_extremes() -> None:
    values = [0.0] * 10_000
    values[1234], values[7777] = 50.0, -3.0
    steps, kept = thinned(list(range(10_000)), values)
    assert len(kept) <= 400
    assert (max(kept), min(kept)) == (50.0, -3.0)
    assert steps[kept.index(50.0)] == 1234
    assert list(steps) == sorted(set(steps))
    assert thinned([1, 2], [3.0, 4.0]) == ([1, 2], [3.0, 4.0])


def test_axes_are_chosen_for_the_values() -> None:
    def axes_of(values: list[float], **options: Any) -> Any:
        series = Series("x", list(range(1, len(values) + 1)), values)
        return draw_chart(Chart("x", "", [series], **options)).axes[0]

    assert axes_of([1.0, 2.0, 7.0]).get_yscale() == "linear"
    assert axes_of([1.0, 2.0, 900.0]).get_yscale() == "log"
    assert axes_of([0.0, 2.0, 900.0]).get_yscale() == "linear"
    assert axes_of([5.0, 900.0], from_zero=True).get_ylim()[0] == 0
    falling = [8.0, 6.0] + [2.0 + 1 / step for step in range(1, 99)]
    cut = axes_of(falling, cut_start=True)
    assert 2.25 < cut.get_ylim()[1] < 4
    assert any("begins at 8" in text.get_text() for text in cut.texts)
    spike = [*falling[:50], 8.0, *falling[51:]]  # nothing but the beginning may leave the picture
    assert axes_of(spike, cut_start=True).get_ylim()[1] >= 8
    texts = [text.get_text() for text in axes_of([0.1, 0.2], line=(5.0, "far")).texts]
    assert texts == []
    texts = [text.get_text() for text in axes_of([0.1, 9.0], line=(5.0, "near")).texts]
    assert texts == ["near"]


@pytest.mark.parametrize(
    ("value", "largest", "text"),
    [
        (0, 9e6, "0"), (0.02, None, "0.02"), (1500, None, "1,500"), (2000, 14_000, "2k"),
        (25_000, None, "25k"), (1.5e6, None, "1.5M"), (5e5, 2e6, "0.5M"), (-3e9, None, "-3G"),
    ],
)  # fmt: skip
def test_numbers_of_an_axis(value: float, largest: float | None, text: str) -> None:
    assert short(value, largest) == text


def test_the_command_writes_it_at_the_end_and_on_demand(
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tmp_path / "config.json"
    recipe.write_text(json.dumps(make_config(steps=2).to_dict()))
    run_dir = tmp_path / "run"
    assert main(["train", str(recipe), "--run-dir", str(run_dir)]) == 0
    summary = run_dir / "summary.html"
    assert f"summary: {summary}" in capsys.readouterr().out
    first = summary.read_text()
    summary.unlink()
    assert main(["train", str(run_dir), "--summary"]) == 0
    assert summary.read_text() == first
    (tmp_path / "runs").mkdir()
    run_dir.rename(tmp_path / "runs" / "tiny")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "tiny", "--summary"]) == 0  # where it is by default
    assert "summary: runs/tiny/summary.html" in capsys.readouterr().out
    assert main(["train", "nothing", "--run-dir", str(tmp_path / "none"), "--summary"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
