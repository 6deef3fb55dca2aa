"""What a person sees: a bar on a terminal, occasional lines elsewhere."""

from __future__ import annotations

import io

import pytest

from sambay.train.display import Display, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (42.4, "0:42"), (59.6, "1:00"), (725, "12:05"), (11_525, "3:12:05")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_lines_come_now_and_then_and_at_the_end() -> None:
    stream = io.StringIO()
    display = Display(stream, line_seconds=1000)
    for step in range(1, 11):
        display.step(step, 10, tokens=100, seconds=0.5, loss=2.0)
    display.message("hello")
    display.close()
    lines = stream.getvalue().splitlines()
    assert lines == [
        "step 1/10  loss 2.000  200 tokens/s  0:04 left",
        "step 10/10  loss 2.000  200 tokens/s  0:00 left",
        "hello",
    ]


def test_a_terminal_shows_one_line_that_messages_do_not_break() -> None:
    stream = Terminal()
    display = Display(stream)
    display.step(5, 10, tokens=100, seconds=0.5, loss=2.0)
    display.message("hello")
    display.step(10, 10, tokens=100, seconds=0.5, loss=1.5)
    display.close()
    display.close()
    first, second, third, end = stream.getvalue().split("\n")
    assert first.startswith("\r")
    assert "5/10" in first
    assert second == "hello"
    assert "loss 1.500" in third
    assert end == ""


def test_speed_is_smoothed() -> None:
    stream = io.StringIO()
    display = Display(stream, line_seconds=0)
    display.step(1, 3, tokens=100, seconds=1.0, loss=2.0)
    display.step(2, 3, tokens=100, seconds=0.5, loss=2.0)
    assert "110 tokens/s" in stream.getvalue().splitlines()[-1]
