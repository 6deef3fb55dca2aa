"""How far a ladder is, in one line: runs, share of the work, rate and time left."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from sambay.studies.members import Member
from sambay.studies.results import steps_done
from sambay.train.display import duration

_BAR_WIDTH = 16


class Progress:
    """Work done of all work, in floating-point operations, so that large runs count as large.

    `finished` are those that were done before.
    """

    def __init__(self, members: Sequence[Member], finished: Sequence[Member], runs: Path) -> None:
        self._runs = runs
        self._flops = {one.name: one.flops for one in members if one.config is not None}
        self._steps = {one.name: one.config.num_steps for one in members if one.config is not None}
        names = {one.name for one in finished}
        self._shares = {name: 1.0 if name in names else self._share(name) for name in self._flops}
        self._at_start = self._done()
        self._started = time.monotonic()

    def update(self, name: str) -> int:
        """Look how far a run is; the steps it has done."""
        self._shares[name] = self._share(name)
        return steps_done(self._runs / name)[0]

    def finish(self, name: str) -> None:
        """A run is at its end."""
        self._shares[name] = 1.0

    @property
    def rate(self) -> float:
        """Operations per second since this started."""
        return (self._done() - self._at_start) / max(time.monotonic() - self._started, 1e-9)

    def line(self, running: Sequence[str], elsewhere: Sequence[str]) -> str:
        """Everything in one line."""
        done, total = self._done(), sum(self._flops.values())
        share = done / total
        filled = int(_BAR_WIDTH * share)
        num_done = sum(share == 1.0 for share in self._shares.values())
        left = duration((total - done) / self.rate) if self.rate > 0 else "?"
        parts = [
            f"{num_done}/{len(self._shares)} runs |{'━' * filled}{' ' * (_BAR_WIDTH - filled)}| "
            f"{share:.1%}  {self.rate / 1e9:,.3g} GFLOP/s  {left} left"
        ]
        for name in running:
            step, loss = steps_done(self._runs / name)
            shown = "" if loss is None else f" loss {loss:.3f}"
            parts.append(f"{name} {step}/{self._steps[name]}{shown}")
        if elsewhere:
            parts.append(f"elsewhere: {', '.join(elsewhere)}")
        return "  ".join(parts)

    def _done(self) -> float:
        return sum(share * self._flops[name] for name, share in self._shares.items())

    def _share(self, name: str) -> float:
        # A run is only done when its model is written, which is not for this to say.
        return min(steps_done(self._runs / name)[0] / self._steps[name], 0.999)


class Display:
    """Writes to a stream (standard error by default): one line redrawn on a terminal.

    Elsewhere a line appears every `line_seconds`.
    """

    def __init__(self, stream: TextIO | None = None, line_seconds: float = 60.0) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream.isatty()
        self._interval = 1.0 if self._is_terminal else line_seconds
        self._shown_at = time.monotonic() - self._interval + 1.0  # the first after a second
        self._line_is_open = False

    @property
    def is_due(self) -> bool:
        """Whether it is time for a new state of the line."""
        return time.monotonic() - self._shown_at >= self._interval

    def show(self, line: str) -> None:
        """Show the state."""
        self._shown_at = time.monotonic()
        if self._is_terminal:
            self._write("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1])
            self._line_is_open = True
        else:
            self._write(line + "\n")

    def message(self, text: str) -> None:
        """Show a line that stays, above the state."""
        self.close()
        self._write(text + "\n")

    def close(self) -> None:
        """End the line of the state, if one is shown."""
        if self._line_is_open:
            self._write("\r\x1b[K")
            self._line_is_open = False

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
