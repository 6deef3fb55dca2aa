from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sambay.errors import ConfigError
from sambay.spec import LayerKind, MemorySource, format_pattern, parse_pattern
from sambay.spec.layers import prefill_split, resolve_layers


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("24xF", "F" * 24),
        ("6x(S S S F)", "SSSF" * 6),
        ("4x(M S) M F 3x(G C)", "MSMSMSMSMFGCGCGC"),
        ("  2 x ( M 2x(S F) )M ", "MSFSFMSFSFM"),
        ("MSF", "MSF"),
    ],
)
def test_patterns_expand(text: str, letters: str) -> None:
    assert parse_pattern(text) == letters


@pytest.mark.parametrize(
    ("letters", "text"),
    [
        ("F" * 16, "16xF"),
        ("MSMSMSMSMFGCGCGC", "4x(M S) M F 3x(G C)"),
        ("SSSF" * 4, "4x(S S S F)"),
        ("S" * 9 + "F" + "C" * 6, "9xS F 6xC"),
        ("MSMSMFGC", "2x(M S) M F G C"),
    ],
)
def test_canonical_text(letters: str, text: str) -> None:
    assert format_pattern(letters) == text


@given(st.text(alphabet="MSFGC", min_size=1, max_size=60))
def test_every_pattern_survives_printing(letters: str) -> None:
    text = format_pattern(letters)
    assert parse_pattern(text) == letters
    assert format_pattern(parse_pattern(text)) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("4x(M S", "not closed"),
        ("M S)", "closes nothing"),
        ("2x()", "closes nothing"),
        ("M X F", "unknown layer letter 'X'"),
        ("3x", "repeats nothing"),
        ("0xM", "1 to"),
        ("2x3xM", "two repetitions"),
        ("M, S", "at character 2"),
        ("9999x(M S)", "1 to"),
        ("4000x(4000xM)", "more than"),
    ],
)
def test_bad_patterns_say_where_and_what(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")) as caught:
        parse_pattern(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "source", "words"),
    [
        ("S F G", "mamba", r"layer 2 \(G\) reads a mamba memory"),
        ("M S C", "mamba", r"layer 2 \(C\) reads keys and values"),
        ("M S G F", "attention", r"layer 2 \(G\) reads a attention memory|attention memory"),
    ],
)
def test_readers_need_a_source(pattern: str, source: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve_layers(pattern, window=4, memory_source=MemorySource(source))


def test_windows_are_needed_only_by_sliding_layers() -> None:
    with pytest.raises(ConfigError, match=r"window: layer 1 \(S\)"):
        resolve_layers("M S", window=None, memory_source=MemorySource.MAMBA)
    assert resolve_layers("M F", window=None, memory_source=MemorySource.MAMBA)[1].window is None


@pytest.mark.parametrize("depth", [8, 12, 16, 20, 24, 32])
def test_sambay_layers_follow_the_released_index_rule(depth: int) -> None:
    half = depth // 2
    layers = resolve_layers(
        f"{depth // 4}x(M S) M F {depth // 4 - 1}x(G C)",
        window=3,
        memory_source=MemorySource.MAMBA,
    )
    for layer in layers:
        i = layer.index
        if i <= half and i % 2 == 0:
            expected = LayerKind.MAMBA
        elif i < half:
            expected = LayerKind.SLIDING
        elif i == half + 1:
            expected = LayerKind.FULL
        else:
            expected = LayerKind.GATED_MEMORY if i % 2 == 0 else LayerKind.CROSS
        assert layer.kind is expected, i
        assert layer.memory_from == (half if expected is LayerKind.GATED_MEMORY else None)
        assert layer.kv_from == (half + 1 if expected is LayerKind.CROSS else None)
        assert (layer.publishes_memory is not None) == (i == half)
        assert layer.publishes_kv == (i == half + 1)
    assert prefill_split(layers) == half + 1


def test_each_reader_is_bound_to_the_nearest_earlier_source() -> None:
    layers = resolve_layers("M G F C M G F C", window=None, memory_source=MemorySource.MAMBA)
    assert [layer.memory_from for layer in layers if layer.kind is LayerKind.GATED_MEMORY] == [0, 4]
    assert [layer.kv_from for layer in layers if layer.kind is LayerKind.CROSS] == [2, 6]
    assert prefill_split(layers) == 6
