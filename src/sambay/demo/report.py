"""What the demo leaves behind: pictures, results.json, report.md, and the table it ends with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sambay.files import atomic_write, write_json
from sambay.plots.architecture import draw_architecture
from sambay.plots.canvas import save
from sambay.plots.curves import Curve, Panel, draw_panels
from sambay.spec import ModelConfig
from sambay.speed import GenerationSpeed

Row = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ModelResult:
    """What was measured of one model.

    `history` are the lines of its metrics.jsonl; `bits_per_byte` is of the whole validation split.
    """

    title: str
    config: ModelConfig
    parameters: int
    history: Sequence[Mapping[str, Any]]
    bits_per_byte: float
    speed: Sequence[GenerationSpeed]

    @property
    def training_tokens_per_second(self) -> float:
        """Over the whole run, evaluations and checkpoints left out."""
        return self.history[-1]["tokens"] / self.history[-1]["seconds"]


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """Everything the demo measured, and where."""

    models: Sequence[ModelResult]
    compressors: Mapping[str, float]  # bits per byte of the validation text
    validation_bytes: int
    validation_tokens: int
    total_tokens: int  # seen by each model in training
    environment: str
    command: str
    date: str
    commit: str
    prompt: str
    continuation: str
    seconds: float


def write_report(result: DemoResult, folder: Path) -> list[Path]:
    """Write pictures, results.json and report.md; returns their paths."""
    pictures = [
        save(_losses(result), folder / "losses.png"),
        save(_speeds(result), folder / "speed.png"),
        draw_architecture(result.models[0].config, result.models[0].title).save(
            folder / "architecture.png"
        ),
    ]
    numbers = dataclasses.asdict(
        dataclasses.replace(result, models=[]),
    )
    numbers["models"] = [
        {
            "title": model.title,
            "config": model.config.to_dict(),
            "parameters": model.parameters,
            "training_tokens_per_second": model.training_tokens_per_second,
            "bits_per_byte": model.bits_per_byte,
            "speed": [dataclasses.asdict(point) for point in model.speed],
        }
        for model in result.models
    ]
    write_json(folder / "results.json", numbers)
    with atomic_write(folder / "report.md") as file:
        file.write(_markdown(result).encode())
    return [*pictures, folder / "results.json", folder / "report.md"]


def quality_rows(result: DemoResult) -> list[Row]:
    """Models and compressors by the bits they need for a byte of held-out text."""
    rows: list[Row] = [("", "parameters", "bits per byte")]
    for model in result.models:
        rows.append((model.title, f"{model.parameters / 1e6:.2f} M", f"{model.bits_per_byte:.3f}"))
    for name, bits in result.compressors.items():
        rows.append((name, "", f"{bits:.3f}"))
    return rows


def speed_rows(result: DemoResult) -> list[Row]:
    """Training, prefill, decode and cache of all models, at the shortest and longest context."""
    rows: list[Row] = [("", *(model.title for model in result.models))]

    def add(label: str, values: Sequence[float], digits: int = 0) -> None:
        rows.append((label, *(f"{value:,.{digits}f}" for value in values)))

    add("training, tokens/s", [model.training_tokens_per_second for model in result.models])
    for index in (0, -1):
        points = [model.speed[index] for model in result.models]
        at = f"at {points[0].context:,}"
        add(f"prefill {at}, tokens/s", [point.prefill_tokens_per_second for point in points])
        add(f"decode {at}, tokens/s", [point.decode_tokens_per_second for point in points])
        add(f"cache {at}, MiB", [point.cache_bytes / 2**20 for point in points], 1)
    return rows


def as_table(rows: Sequence[Row], indent: str = "  ") -> str:
    """Rows as aligned text: the first column to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append((indent + "   ".join(cells)).rstrip())
    lines.insert(1, indent + "─" * (sum(widths) + 3 * (len(widths) - 1)))
    return "\n".join(lines)


def _losses(result: DemoResult) -> Any:
    bits = {model.title: _training_bits(result, model) for model in result.models}
    panels = []
    for title, label, unit in (
        ("Bits per byte, by tokens seen", "million tokens", 1e6),
        ("Bits per byte, by training time", "minutes of training", 60.0),
    ):
        key = "tokens" if unit == 1e6 else "seconds"
        curves = []
        for model in result.models:
            every = [line[key] / unit for line in model.history]
            smooth = _running_mean(bits[model.title])
            curves.append(Curve(model.title, every, smooth, is_background=True))
            seen = [line for line in model.history if "validation_bits_per_byte" in line]
            curves.append(
                Curve(
                    model.title,
                    [line[key] / unit for line in seen],
                    [line["validation_bits_per_byte"] for line in seen],
                )
            )
        panels.append(
            Panel(title, label, curves, lines=_plain(result), y_top=_top(result), y_from_zero=False)
        )
    caption = (
        f"thick: validation, thin: training, mean of 10 steps · "
        f"{result.models[0].parameters / 1e6:.1f} M parameters each, same batches · "
        f"{result.environment}"
    )
    return draw_panels(panels, caption)


def _speeds(result: DemoResult) -> Any:
    def curves(value: Any) -> list[Curve]:
        return [
            Curve(
                model.title,
                [point.context for point in model.speed],
                [value(point) for point in model.speed],
            )
            for model in result.models
        ]

    def panel(title: str, value: Any) -> Panel:
        return Panel(
            title, "context, tokens", curves(value), y_from_zero=True, x_in_powers_of_two=True
        )

    panels = [
        panel("Prefill, thousand tokens/s", lambda point: point.prefill_tokens_per_second / 1e3),
        panel("Decode, tokens/s", lambda point: point.decode_tokens_per_second),
        panel("Cache, MiB", lambda point: point.cache_bytes / 2**20),
    ]
    batch_size = result.models[0].speed[0].batch_size
    return draw_panels(panels, f"batch {batch_size}, float32 · {result.environment}")


def _training_bits(result: DemoResult, model: ModelResult) -> list[float]:
    """The training loss of each step in bits per byte, by the validation text's bytes per token."""
    bytes_per_token = result.validation_bytes / result.validation_tokens
    return [line["loss"] / math.log(2) / bytes_per_token for line in model.history]


def _running_mean(values: Sequence[float], width: int = 10) -> list[float]:
    """Each value with up to `width` - 1 before it, averaged."""
    windows = (values[max(0, end - width) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def _plain(result: DemoResult) -> dict[str, float]:
    return {name: bits for name, bits in result.compressors.items() if "," not in name}


def _top(result: DemoResult) -> float:
    return 1.8 * max(_plain(result).values())


def _markdown(result: DemoResult) -> str:
    return f"""# A run of the demo

Command: `{result.command}` · commit {result.commit} · {result.date} · {result.environment} · one
seed · {result.seconds / 60:.1f} minutes in all.

Both models saw the same {result.total_tokens:,} tokens of the Python standard library's sources
(without tests and generated tables) in the same order. Held out are
{result.validation_bytes:,} bytes of other files of it.
"xz -9, primed" is what the held-out text adds to xz's output when the training text comes first.

{_markdown_table(quality_rows(result))}

![Loss curves](losses.png)

Speed with batch {result.models[0].speed[0].batch_size} in float32; of several alternating
readings the fastest counts.

{_markdown_table(speed_rows(result))}

![Speed curves](speed.png)

The SambaY continues a prompt (temperature 0.7, seed 0):

```text
{result.prompt}{result.continuation}
```

![The model](architecture.png)
"""


def _markdown_table(rows: Sequence[Row]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, f"| --- |{' ---: |' * (len(rows[0]) - 1)}")
    return "\n".join(lines)
