"""Stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Iterable

from sambay.errors import ConfigError


class StopMatcher:
    """Passes text on up to the first stop string, holding back what could become one.

    The first stop string to be completed wins, the longest of those completed by the same
    character; so the result does not depend on how the text was cut into pieces.

    Raises:
        ConfigError: an empty stop string.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self.stops = tuple(stops)
        if "" in self.stops:
            raise ConfigError("a stop string is empty; give at least one character or leave it out")
        self.matched: str | None = None
        self._held = ""

    def push(self, text: str) -> str:
        """The part of all text so far that is now certain to be wanted and was not yet returned.

        After a match (`matched` names the stop string) nothing more is ever returned.
        """
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(place + len(s), place, s) for s in self.stops if (place := text.find(s)) >= 0]
        if found:
            _, place, self.matched = min(found)
            self._held = ""
            return text[:place]
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, now that no more text will come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without completing it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
