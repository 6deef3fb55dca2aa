"""Ctrl-C and SIGTERM as a request that the loop honours between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, the first SIGINT or SIGTERM is only noted; a second one acts as usual.

    `signal_number` is None until then. With `insistent=False` further ones change nothing: one of
    many processes gets the same signal from several sides (the terminal, torchrun), and torchrun
    ends by itself what does not end in time. Outside the main thread, where Python allows no
    handlers, nothing is caught.
    """

    def __init__(self, *, insistent: bool = True) -> None:
        self.signal_number: int | None = None
        self._insistent = insistent
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        if self._insistent:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}
