"""A run on one page: RUN_DIR/summary.html, made from the files of the run alone.

metrics.jsonl and config.json suffice; environment.json adds where it was computed. The page needs
nothing but itself, so it can be sent around, and it can be made again at any time.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sambay.errors import ConfigError, DataError
from sambay.files import atomic_write
from sambay.plots.run_charts import Chart, Series
from sambay.train.config import RunConfig, read_run_config
from sambay.train.display import duration
from sambay.train.environment import Environment, read_environment
from sambay.train.metrics import readable_metrics
from sambay.train.plan import describe
from sambay.train.run_dir import CONFIG, METRICS, SUMMARY
from sambay.train.summary_page import Fact, Page, render

_GIB = 2**30
_MEMORY = {
    "device_peak": "GPU, most so far",
    "device": "GPU",
    "host_peak": "host, most so far",
    "host": "host",
}
Lines = Sequence[dict[str, Any]]


def write_summary(run_dir: Path) -> Path:
    """The page of the run in `run_dir`, which may still go on.

    Raises:
        ConfigError: there is no config.json, or it is no JSON (names it).
        DataError: nothing was measured yet.
        WriteFailed: the operating system refused.
    """
    page = summary_page(run_dir)
    path = run_dir / SUMMARY
    with atomic_write(path) as file:
        file.write(render(page).encode())
    return path


def summary_page(run_dir: Path) -> Page:
    """What the page of a run says."""
    notes: list[str] = []
    values, config = _read_config(run_dir / CONFIG, notes)
    lines, damaged = readable_metrics(run_dir)
    if damaged:
        which = ", ".join(map(str, damaged[:8])) + (" ..." if len(damaged) > 8 else "")
        notes.append(f"{METRICS}: lines that cannot be read were left out: {which}")
    if not lines:
        raise DataError(f"{run_dir / METRICS} holds no measurements; train at least one step")
    try:
        environment = read_environment(run_dir)
    except DataError as error:
        environment = None
        notes.append(str(error))
    starts = environment.starts if environment else []
    return Page(
        title=run_dir.resolve().name,
        subtitle=_subtitle(lines, config),
        facts=_facts(lines),
        notes=notes,
        charts=charts(lines, config),
        evaluations=_evaluations(lines),
        description=_description(config, environment),
        starts=starts,
        configuration=json.dumps(values, indent=2, ensure_ascii=False),
    )


def charts(lines: Lines, config: RunConfig | None) -> list[Chart]:
    """The pictures of a run; what was not measured is left out."""
    clip = None if config is None else config.optimizer.clip_norm
    norms = _all_series(lines, _under(lines, "gradient_norm/"))
    total = _series("all", lines, "gradient_norm", style="total" if norms else "line")
    rates = {"all others": "learning_rate", **_under(lines, "learning_rate/")}
    if len(rates) == 1:
        rates = {"learning rate": "learning_rate"}
    parts = {
        name.removesuffix("/loss"): metric
        for name, metric in _under(lines, "validation/").items()
        if name.endswith("/loss")
    }
    memory = {text: f"memory/{name}" for name, text in _MEMORY.items()}
    shares = {
        name.removesuffix("/share"): metric
        for name, metric in _under(lines, "data/").items()
        if name.endswith("/share")
    }
    rate = _series("tokens/s", lines, "tokens_per_second")
    all_charts = [
        Chart(
            "Loss",
            "nats per token",
            [
                *_with_mean(_series("training", lines, "loss")),
                _series("validation", lines, "validation_loss", style="points"),
            ],
            cut_start=True,
        ),
        Chart(
            "Validation loss by set and length",
            "nats per token",
            [_series(name, lines, metric, style="points") for name, metric in parts.items()],
            cut_start=True,
        ),
        Chart("Learning rate", "", _all_series(lines, rates), from_zero=True),
        Chart(
            "Gradient norm before clipping",
            "",
            [*norms, total],
            line=None if clip is None else (clip, f"clipped to {clip:g}"),
        ),
        Chart("Speed", "tokens per second", _with_mean(rate), from_zero=True),
        Chart(
            "Model FLOPs utilisation (MFU)",
            "% of the stated peak",
            _with_mean(_series("MFU", lines, "mfu", scale=100)),
            from_zero=True,
        ),
        Chart("Memory", "GiB", _all_series(lines, memory, scale=1 / _GIB), from_zero=True),
        Chart("Share of the data so far", "%", _all_series(lines, shares, 100), from_zero=True),
        Chart(
            "Skipped steps so far",
            "",
            [_skipped(lines)],
            from_zero=True,
        ),
    ]
    return [kept for chart in all_charts if (kept := _without_empty(chart)).series]


def _read_config(path: Path, notes: list[str]) -> tuple[dict[str, Any], RunConfig | None]:
    try:
        config = read_run_config(path)
    except ConfigError as error:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise error from None
        if not isinstance(values, dict):
            raise
        notes.append(f"not understood, so sizes are missing: {error}")
        return values, None
    return config.to_dict(), config


def _subtitle(lines: Lines, config: RunConfig | None) -> str:
    step = lines[-1]["step"]
    if config is None:
        return f"step {step:,}"
    if step >= config.num_steps:
        return f"finished: {step:,} steps"
    return f"step {step:,} of {config.num_steps:,}"


def _facts(lines: Lines) -> list[Fact]:
    """The last or typical values, each with what it is and where it is from."""
    facts = []
    for name, metric, digits in (
        ("training loss", "loss", 4),
        ("validation loss", "validation_loss", 4),
        ("bits per byte", "validation_bits_per_byte", 4),
    ):
        series = _series(name, lines, metric)
        if series.values:
            value = series.values[-1]
            at = f"at step {int(series.steps[-1]):,}"
            facts.append(Fact(name, value, f"{value:.{digits}f}", at))
    last = lines[-1]
    for name, metric, text in (
        ("tokens", "tokens", lambda value: f"{value:,.0f}"),
        ("time on steps", "seconds", lambda value: duration(value)),
        ("skipped steps", "skipped", lambda value: f"{value:,.0f}"),
        ("rewinds", "rewinds", lambda value: f"{value:,.0f}"),
    ):
        if _is_number(last.get(metric)):
            facts.append(Fact(name, last[metric], text(last[metric]), ""))
    for name, metric, text in (
        ("tokens/s", "tokens_per_second", lambda value: f"{value:,.0f}"),
        ("MFU", "mfu", lambda value: f"{value:.1%}"),
    ):
        series = _series(name, lines, metric)
        if series.values:
            value = statistics.median(series.values)
            facts.append(Fact(name, value, text(value), "median"))
    return facts


def _evaluations(lines: Lines) -> tuple[list[str], list[list[float | None]]]:
    """The table of evaluations: its head, and a row of values for each."""
    rows = [line for line in lines if any(name.startswith("validation") for name in line)]
    names = list(dict.fromkeys(name for line in rows for name in line if "validation" in name))
    head = ["step", "tokens", *names]
    cells = [[line[name] if _is_number(line.get(name)) else None for name in head] for line in rows]
    return head, cells


def _description(
    config: RunConfig | None, environment: Environment | None
) -> list[tuple[str, str]]:
    rows = [] if config is None else describe(config)
    if config is not None:
        rows += [
            ("data", ", ".join(source.directory for source in config.data.sources)),
            ("random numbers", f"seed {config.seed}, for weights, order of the data and dropout"),
        ]
    if environment is None:
        return [*rows, ("environment", "not recorded")]
    last = environment.starts[-1] if environment.starts else {}
    per_token, peak = last.get("flops_per_token"), last.get("peak_flops")
    if _is_number(per_token):
        # What is counted is said where the number is, since conventions differ.
        without = " without attention," if config and config.data.separate_documents else ""
        text = f"{per_token:.4g} per token:{without} forward x 3, matrix products and head"
        text += "" if without else ", visible pairs of attention"
        rows.append(("training FLOPs", text))
    rows.append(
        ("peak for MFU", f"{peak:.4g} FLOP/s" if _is_number(peak) else "not stated, so no MFU")
    )
    return [*rows, ("run id", environment.run_id)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _series(
    name: str, lines: Lines, metric: str, scale: float = 1.0, style: str = "line"
) -> Series:
    known = [line for line in lines if _is_number(line.get(metric))]
    return Series(
        name,
        [line["step"] for line in known],
        [line[metric] * scale if scale != 1 else line[metric] for line in known],
        style,
    )


def _all_series(lines: Lines, metrics: dict[str, str], scale: float = 1.0) -> list[Series]:
    return [_series(name, lines, metric, scale) for name, metric in metrics.items()]


def _skipped(lines: Lines) -> Series:
    """How many steps were skipped by each step; nothing if none was."""
    counts = [line.get("skipped", 0) for line in lines]
    if not any(counts):
        return Series("skipped", [], [])
    return Series("skipped", [line["step"] for line in lines], counts)


def _under(lines: Lines, prefix: str) -> dict[str, str]:
    """The metrics whose names begin with `prefix`, by the rest of their names."""
    names = dict.fromkeys(name for line in lines for name in line if name.startswith(prefix))
    return {name.removeprefix(prefix): name for name in names}


def _with_mean(series: Series) -> list[Series]:
    """A series that jumps, in the background of its running mean."""
    count = len(series.values)
    reach = count // 60
    if reach == 0:
        return [series]
    sums = [0.0]
    for value in series.values:
        sums.append(sums[-1] + value)
    means = []
    for index in range(count):
        low, high = max(0, index - reach), min(count, index + reach + 1)
        means.append((sums[high] - sums[low]) / (high - low))
    name = f"{series.name}, mean of {2 * reach + 1}"
    return [
        Series(series.name, series.steps, series.values, "thin"),
        Series(name, series.steps, means),
    ]


def _without_empty(chart: Chart) -> Chart:
    series = [one for one in chart.series if one.values]
    return Chart(chart.title, chart.unit, series, chart.line, chart.from_zero, chart.cut_start)
