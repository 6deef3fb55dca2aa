"""The layer pattern: one short text such as "4x(M S) M F 3x(G C)" that is the architecture.

Grammar: layer letters separated by blanks; `nxL` repeats a letter and `nx(...)` repeats a group.

    M  recurrent mixer (Mamba)          S  sliding-window attention
    F  full attention                   G  gated memory unit
    C  cross-attention to the shared keys and values
"""

from __future__ import annotations

import re

from sambay.errors import ConfigError

LETTERS = "MSFGC"
MAX_LAYERS = 4096

_TOKEN = re.compile(
    r"\s*(?:(?P<repeat>\d+)\s*x\s*|(?P<open>\()|(?P<close>\))|(?P<letter>[A-Za-z]))"
)


def parse_pattern(text: str) -> str:
    """The expanded pattern, one letter per layer: "2x(M S) F" gives "MSMSF".

    Raises:
        ConfigError: an unknown letter, an unbalanced bracket, a repetition of nothing, no layers.
    """
    stack: list[tuple[str, int]] = []  # what stood before each open bracket, and its repetition
    letters, repeat, position = "", None, 0
    while position < len(text.rstrip()):
        match = _TOKEN.match(text, position)
        if match is None:
            raise _error(text, position, "expected a layer letter, 'nx' or a bracket")
        if match["repeat"]:
            if repeat is not None:
                raise _error(text, match.start(), "two repetitions in a row; nest them in brackets")
            repeat = int(match["repeat"])
            if not 1 <= repeat <= MAX_LAYERS:
                raise _error(text, match.start(), f"a repetition must be 1 to {MAX_LAYERS}")
        elif match["open"]:
            stack.append((letters, repeat or 1))
            letters, repeat = "", None
        elif match["close"]:
            if not stack or repeat is not None or not letters:
                raise _error(text, match.end() - 1, "this bracket closes nothing")
            before, times = stack.pop()
            letters = before + letters * times
        else:
            letter = match["letter"]
            if letter not in LETTERS:
                known = ", ".join(LETTERS)
                raise _error(text, match.end() - 1, f"unknown layer letter '{letter}' ({known})")
            letters += letter * (repeat or 1)
            repeat = None
        if len(letters) > MAX_LAYERS:
            raise ConfigError(f"layer_pattern: more than {MAX_LAYERS} layers; shorten it")
        position = match.end()
    if stack:
        raise _error(text, len(text), "a bracket is not closed; add ')'")
    if repeat is not None:
        raise _error(text, len(text), "the last repetition repeats nothing")
    if not letters:
        raise ConfigError("layer_pattern is empty; write for example '4x(M S) M F 3x(G C)'")
    return letters


def format_pattern(letters: str) -> str:
    """The canonical text of an expanded pattern: "MSMSF" gives "2x(M S) F".

    At each position the repetition covering the most layers is taken, the shortest unit on a tie.
    """
    parts: list[str] = []
    start = 0
    while start < len(letters):
        unit, times = letters[start], 1
        for size in range(1, (len(letters) - start) // 2 + 1):
            candidate = letters[start : start + size]
            count = 1
            while letters.startswith(candidate, start + count * size):
                count += 1
            if count > 1 and count * size > max(len(unit) * times, 2):
                unit, times = candidate, count
        body = " ".join(unit) if len(unit) == 1 else f"({' '.join(unit)})"
        parts.append(body if times == 1 else f"{times}x{body}")
        start += len(unit) * times
    return " ".join(parts)


def _error(text: str, position: int, what: str) -> ConfigError:
    return ConfigError(f"layer_pattern '{text}': {what} (at character {position + 1})")
