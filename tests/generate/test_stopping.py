"""Stop strings found across every way of cutting the text."""

from __future__ import annotations

import random

import pytest

from sambay.errors import ConfigError
from sambay.generate.stopping import StopMatcher


def cut_at_first_completed(text: str, stops: list[str]) -> tuple[str, str | None]:
    for end in range(len(text) + 1):
        matched = [stop for stop in stops if text[:end].endswith(stop)]
        if matched:
            longest = max(matched, key=len)
            return text[: end - len(longest)], longest
    return text, None


def test_any_cutting_gives_the_text_before_the_first_completed_stop() -> None:
    chance = random.Random(3)
    stopped = 0
    for _ in range(3000):
        stops = ["".join(chance.choices("ab", k=chance.randint(1, 4))) for _ in range(3)]
        stops = stops[: chance.randint(0, 3)]
        text = "".join(chance.choices("abc", k=chance.randint(0, 12)))
        wanted, stop = cut_at_first_completed(text, stops)
        matcher, given, at = StopMatcher(stops), "", 0
        while at < len(text) and matcher.matched is None:
            size = chance.randint(0, 3)
            given += matcher.push(text[at : at + size])
            at += size
            assert wanted.startswith(given)
            # No more is held back than could begin a stop string.
            seen = text[:at]
            if matcher.matched is None:
                held = seen[len(given) :]
                assert held == "" or any(s.startswith(held) for s in stops)
        given += matcher.finish()
        assert (given, matcher.matched) == (wanted, stop)
        stopped += stop is not None
    assert stopped > 500


def test_nothing_follows_a_match() -> None:
    matcher = StopMatcher(["\n\n"])
    assert matcher.push("one\n") == "one"
    assert matcher.push("\ntwo") == ""
    assert matcher.push("three") == ""
    assert matcher.finish() == ""
    assert matcher.matched == "\n\n"


def test_a_beginning_that_leads_nowhere_is_given_back() -> None:
    matcher = StopMatcher(["aab"])
    assert [matcher.push(c) for c in "aaac"] == ["", "", "a", "aac"]


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ConfigError, match="stop string is empty"):
        StopMatcher(["x", ""])
