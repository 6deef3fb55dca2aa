"""Text in, text out: characters, stop strings and samples, streamed and at once."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from sambay.errors import ConfigError
from sambay.generate import Engine, SamplingParams, TextCompletion, TextGenerator
from tests import tiny
from tests.generate.scripted import ScriptedModel

pytest.importorskip("tokenizers")
from sambay.data.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("plenty")

SAID = 'The naïve 猫 said: "fin"\n\n👩‍👩‍👧 then finally stopped.'


@cache
def byte_tokenizer() -> Tokenizer:
    """Nearly one token per byte, so characters and stop strings lie across tokens."""
    return Tokenizer.train(["the then there the then"] * 5, 260)


def generator_that_says(text: str, *, end: bool = True) -> TextGenerator:
    tokenizer = byte_tokenizer()
    script = tokenizer.encode(text) + [tokenizer.eos_id] * end
    model = ScriptedModel(script, len(tokenizer.encode("Hi")), tokenizer.vocab_size + 3)
    return TextGenerator(model.engine(), tokenizer)


def test_a_text_arrives_in_whole_characters_and_ends_before_the_end_token() -> None:
    stream = generator_that_says(SAID).stream("Hi", max_new_tokens=500)
    pieces = list(stream)
    assert "".join(pieces) == SAID
    assert len(pieces) > len(SAID) / 3
    assert all(piece and "\ufffd" not in piece for piece in pieces)
    assert stream.finish_reason == "stop"
    assert stream.tokens[-1] == byte_tokenizer().eos_id
    assert next(stream, None) is None


@pytest.mark.parametrize("stop", ["fin", "猫", "\n\n", "👩‍👩‍👧", "stopped.", "T"])
def test_a_stop_string_is_cut_off_wherever_tokens_divide_it(stop: str) -> None:
    generator = generator_that_says(SAID)
    stops = ["never said", stop]
    pieces = list(generator.stream("Hi", max_new_tokens=500, stop=stops))
    assert "".join(pieces) == SAID[: SAID.index(stop)]
    at_once = generator.generate(["Hi"], max_new_tokens=500, stop=stops)[0]
    assert at_once.text == SAID[: SAID.index(stop)]
    assert at_once.finish_reason == "stop"
    # Generation ended with the token that completed the stop string.
    through = SAID[: SAID.index(stop) + len(stop)]
    assert byte_tokenizer().decode(at_once.tokens) == through


def test_what_might_have_become_a_stop_string_is_given_at_the_end() -> None:
    generator = generator_that_says("one finally", end=False)
    stream = generator.stream("Hi", max_new_tokens=7, stop=["finish"])
    pieces = list(stream)
    assert "".join(pieces) == byte_tokenizer().decode(stream.tokens) == "one fin"
    assert pieces[-1] == "fin"
    assert stream.finish_reason == "length"


def test_half_a_character_at_the_limit_becomes_a_replacement_character() -> None:
    generator = generator_that_says("ab👩", end=False)
    stream = generator.stream("Hi", max_new_tokens=4)
    assert list(stream) == ["a", "b", "\ufffd"]
    assert generator.generate(["Hi"], max_new_tokens=4)[0].text == "ab\ufffd"


def test_other_stop_tokens_replace_the_end_token() -> None:
    tokenizer = byte_tokenizer()
    generator = generator_that_says("ab!cd")
    (bang,) = tokenizer.encode("!")
    stopped = generator.generate(["Hi"], max_new_tokens=20, stop_token_ids=[bang])[0]
    assert (stopped.text, stopped.finish_reason) == ("ab", "stop")
    assert stopped.tokens[-1] == bang
    onward = generator.generate(["Hi"], max_new_tokens=20, stop_token_ids=())[0]
    assert (onward.text, onward.finish_reason) == ("ab!cd", "length")
    assert len(onward.tokens) == 20


def test_ids_beyond_the_tokenizer_are_harmless() -> None:
    tokenizer = byte_tokenizer()
    model = ScriptedModel([tokenizer.vocab_size + 2, tokenizer.eos_id], 2, tokenizer.vocab_size + 3)
    generator = TextGenerator(model.engine(), tokenizer)
    assert generator.generate(["Hi"], max_new_tokens=5)[0].text == ""
    assert list(generator.stream("Hi", max_new_tokens=5)) == []


@cache
def real_generator() -> TextGenerator:
    tokenizer = byte_tokenizer()
    model = tiny.tiny_model("sambay", dtype=torch.float32, vocab_size=tokenizer.vocab_size)
    return TextGenerator(Engine(model), tokenizer)


def test_samples_come_in_order_differ_and_do_not_depend_on_batching() -> None:
    generator = real_generator()
    prompts = ["one", "a much longer prompt, twice over", generator.tokenizer.encode("one")]
    warm = SamplingParams(temperature=1.2, top_p=0.95, seed=11)
    told: list[TextCompletion] = []
    results = generator.generate(
        prompts, max_new_tokens=12, sampling=warm, num_samples=3, on_finished=told.append
    )
    assert [(r.prompt, r.sample) for r in results] == [(p, s) for p in range(3) for s in range(3)]
    assert len(told) == 9
    assert all(result in told for result in results)
    small = generator.generate(
        prompts, max_new_tokens=12, sampling=warm, num_samples=3, max_batch_size=2
    )
    assert [r.tokens for r in small] == [r.tokens for r in results]
    assert len({r.text for r in results[:3]}) == 3
    assert [r.text for r in results[6:]] == [r.text for r in results[:3]]
    first = "".join(generator.stream("one", max_new_tokens=12, sampling=warm))
    assert first == results[0].text


def test_closing_a_stream_ends_it() -> None:
    stream = real_generator().stream("one", max_new_tokens=50, stop_token_ids=())
    next(stream)
    count = len(stream.tokens)
    stream.close()
    assert list(stream) == []
    assert len(stream.tokens) == count


def test_wrong_arguments_are_refused() -> None:
    generator = real_generator()
    with pytest.raises(ConfigError, match="prompt 1 is empty"):
        generator.generate(["a", ""], max_new_tokens=3)
    with pytest.raises(ConfigError, match="prompt 0 is empty"):
        generator.stream("", max_new_tokens=3)
    with pytest.raises(ConfigError, match="stop string is empty"):
        generator.stream("a", max_new_tokens=3, stop=[""])
    with pytest.raises(ConfigError, match="stop is the text 'end'; give a list"):
        generator.generate(["a"], max_new_tokens=3, stop="end")
    with pytest.raises(ConfigError, match="num_samples is 0"):
        generator.generate(["a"], max_new_tokens=3, num_samples=0)
    with pytest.raises(ConfigError, match=r"tokenizer has 260 tokens, .* vocab_size is 259"):
        TextGenerator(ScriptedModel([1], 1, 259).engine(), byte_tokenizer())
