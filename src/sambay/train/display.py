"""What a person sees while a run goes on: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

_BAR_WIDTH = 24


class Display:
    """Writes progress to a stream (standard error by default).

    On a terminal one line is redrawn in place; elsewhere a line appears every `line_seconds`.
    """

    def __init__(self, stream: TextIO | None = None, line_seconds: float = 10.0) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream.isatty()
        self._interval = 0.2 if self._is_terminal else line_seconds
        self._shown_at = float("-inf")
        self._bar_is_shown = False
        self._rate = 0.0

    def step(self, step: int, num_steps: int, tokens: int, seconds: float, loss: float) -> None:
        """Show a finished step of `tokens` tokens in `seconds`."""
        rate = tokens / seconds
        self._rate = rate if self._rate == 0 else 0.9 * self._rate + 0.1 * rate
        now = time.monotonic()
        if now - self._shown_at < self._interval and step < num_steps:
            return
        self._shown_at = now
        left = duration((num_steps - step) * tokens / self._rate)
        facts = f"loss {loss:.3f}  {self._rate:,.0f} tokens/s  {left} left"
        if not self._is_terminal:
            self._write(f"step {step}/{num_steps}  {facts}\n")
            return
        filled = _BAR_WIDTH * step // num_steps
        bar = "━" * filled + " " * (_BAR_WIDTH - filled)
        text = f"{step}/{num_steps} |{bar}| {facts}"
        self._write("\r\x1b[K" + text[: shutil.get_terminal_size().columns - 1])
        self._bar_is_shown = True

    def message(self, text: str) -> None:
        """Show a line of its own, above the bar if there is one."""
        self.close()
        self._write(text + "\n")

    def close(self) -> None:
        """End the line of the bar, if one is shown."""
        if self._bar_is_shown:
            self._write("\n")
            self._bar_is_shown = False

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class Silence(Display):
    """Shows nothing: for all processes of a run but one."""

    def step(self, step: int, num_steps: int, tokens: int, seconds: float, loss: float) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""


def duration(seconds: float) -> str:
    """A time as 0:42, 12:05 or 3:12:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
