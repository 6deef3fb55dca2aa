"""`generate` and pipelines of transformers on our classes."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, StaticCache, TextIteratorStreamer, TextStreamer

import sambay
from sambay.hf.modeling import SambaYForCausalLM
from tests.hf.tiny_hf import (
    EOS,
    OFFICIAL,
    PAD,
    VARIANTS,
    fresh_pair,
    padded,
    pair,
    save_with_tokenizer,
    tiny_tokenizer,
    twin,
)
from tests.tiny import random_ids, tiny_model

assert_close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=2e-6)
NEW = 12  # more than twice the window


def generate(model: SambaYForCausalLM, ids: Tensor | None, count: int = NEW, **options: Any) -> Any:
    """Exactly `count` new tokens, greedily and without padding unless the options say otherwise."""
    settings = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count} | options
    if ids is not None:  # else transformers takes every PAD among the ids for padding
        settings.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, **settings)


def by_hand(model: SambaYForCausalLM, ids: Tensor, count: int = NEW) -> Tensor:
    """Greedy decoding by whole forwards."""
    for _ in range(count):
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[:, -1]
        logits[:, EOS] = -torch.inf  # what min_new_tokens does
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
    return ids


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_equals_whole_forwards(name: str) -> None:
    _, model = pair(name)
    ids = random_ids(2, 9)
    expected = by_hand(model, ids)
    assert torch.equal(generate(model, ids), expected)
    assert torch.equal(generate(model, ids, use_cache=False), expected)
    assert torch.equal(generate(model, ids, cache_implementation="static"), expected)
    assert torch.equal(generate(model, ids, prefill_chunk_size=4), expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ("transformer++", "sambay", "mambay", OFFICIAL)),
        *((name, {"cache_implementation": "static"}) for name in ("sambay", OFFICIAL)),
        ("sambay", {"use_cache": False}),
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_continue_like_lonely_ones(
    name: str, side: str, options: dict[str, Any]
) -> None:
    _, model = pair(name)
    rows = [random_ids(1, length, length)[0] for length in (10, 3, 7)]
    ids, mask = padded(rows, side)
    found = generate(model, ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    for row, new in zip(rows, found, strict=True):
        assert torch.equal(new, by_hand(model, row[None])[0, len(row) :])


@pytest.mark.parametrize("name", ["sambay", "s-gdny", OFFICIAL])
def test_beams_with_a_cache_equal_beams_without(name: str) -> None:
    _, model = pair(name)
    rows = [random_ids(1, length, length)[0] for length in (8, 5)]
    ids, mask = padded(rows, "left")
    beams = {"num_beams": 4, "num_return_sequences": 3, "attention_mask": mask}
    expected = generate(model, ids, use_cache=False, **beams)
    assert torch.equal(generate(model, ids, **beams), expected)
    assert torch.equal(generate(model, ids, cache_implementation="static", **beams), expected)
    assert expected.shape == (6, 8 + NEW)
    assert not torch.equal(expected[0], expected[1])
    greedy = generate(model, ids, attention_mask=mask)
    assert score(model, rows[0], expected[0]) >= score(model, rows[0], greedy[0])


def score(model: SambaYForCausalLM, prompt: Tensor, text: Tensor) -> float:
    """The log-probability of the new tokens of a row whose prompt has no padding."""
    with torch.no_grad():
        logits = model(text[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
    logits[:, EOS] = -torch.inf
    return float(logits.log_softmax(-1).gather(1, text[len(prompt) :, None]).sum())


def test_sampling_is_reproducible_from_the_seed() -> None:
    _, model = pair("sambay")
    ids = random_ids(2, 7)
    options = {"do_sample": True, "temperature": 0.9, "top_k": 20, "num_return_sequences": 2}

    def sample(seed: int, **more: Any) -> Tensor:
        torch.manual_seed(seed)
        return generate(model, ids, **options, **more)

    first = sample(3)
    assert first.shape == (4, 7 + NEW)
    assert torch.equal(first, sample(3))
    assert torch.equal(first, sample(3, use_cache=False))
    assert not torch.equal(first, sample(4))
    assert not torch.equal(first[0], first[1])


def test_end_of_sequence_pads_the_rest_of_the_row() -> None:
    _, model = fresh_pair("sambay")
    ids = random_ids(2, 6)
    free = by_hand(model, ids)[:, 6:]
    stop = int(free[0, 4])
    first = [row.tolist().index(stop) if stop in row.tolist() else NEW for row in free]
    found = generate(model, ids, min_new_tokens=0, eos_token_id=[EOS, stop])
    for row, expected, end in zip(found[:, 6:], free, first, strict=True):
        length = min(end + 1, len(row))
        assert torch.equal(row[:length], expected[:length])
        assert (row[length:] == PAD).all()


def test_streams_give_the_text_word_by_word() -> None:
    _, model = pair("sambay")
    tokenizer = tiny_tokenizer()
    inputs = tokenizer("w5 w9 w22 w3", return_tensors="pt")
    expected = tokenizer.decode(generate(model, inputs["input_ids"])[0, 4:])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    writer = threading.Thread(
        target=generate,
        args=(model, inputs["input_ids"]),
        kwargs={"streamer": streamer, "attention_mask": inputs["attention_mask"]},
    )
    writer.start()
    pieces = list(streamer)
    writer.join()
    assert "".join(pieces) == expected
    assert sum(bool(piece) for piece in pieces) > NEW // 2


def test_text_streamer_prints(capsys: pytest.CaptureFixture[str]) -> None:
    _, model = pair("sambay")
    tokenizer = tiny_tokenizer()
    ids = tokenizer("w5 w9 w22 w3", return_tensors="pt")["input_ids"]
    found = generate(model, ids, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out == tokenizer.decode(found[0]) + "\n"


def test_stop_strings_end_the_text() -> None:
    _, model = pair("sambay")
    tokenizer = tiny_tokenizer()
    ids = tokenizer("w5 w9 w22 w3", return_tensors="pt")["input_ids"]
    free = by_hand(model, ids)[0, 4:].tolist()
    stop = f"w{free[5]}"
    found = model.generate(
        ids, do_sample=False, max_new_tokens=NEW, stop_strings=[stop], tokenizer=tokenizer
    )
    text = tokenizer.decode(found[0, 4:])
    assert text.endswith(stop)
    assert found.shape[1] - 4 <= 6


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["sambay", "mambay", "samba", OFFICIAL])
def test_a_returned_cache_continues_the_text(name: str, static: bool) -> None:
    _, model = pair(name)
    ids = random_ids(2, 6)
    cache: Any = (
        StaticCache(config=model.config, max_cache_len=64)
        if static
        else DynamicCache(config=model.config)
    )
    first = generate(model, ids, 5, past_key_values=cache, return_dict_in_generate=True)
    more = torch.cat((first.sequences, random_ids(2, 4, seed=9)), dim=1)
    second = generate(model, more, past_key_values=first.past_key_values)
    assert torch.equal(second, by_hand(model, more))


@pytest.mark.parametrize("name", ["sambay", OFFICIAL])
def test_scores_and_logits_are_those_of_whole_forwards(name: str) -> None:
    _, model = pair(name)
    rows = [random_ids(1, length, length)[0] for length in (8, 5)]
    ids, mask = padded(rows, "left")
    out = generate(
        model,
        ids,
        attention_mask=mask,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        output_hidden_states=True,
    )
    assert len(out.logits) == len(out.scores) == len(out.hidden_states) == NEW
    assert out.hidden_states[0][-1].shape == (2, 8, model.config.hidden_size)
    assert out.hidden_states[1][-1].shape == (2, 1, model.config.hidden_size)
    for row, text, start in zip(range(2), out.sequences, (0, 3), strict=True):
        with torch.no_grad():
            whole = model(text[None, start:], use_cache=False).logits[0]
        assert_close(torch.stack([step[row] for step in out.logits]), whole[-NEW - 1 : -1])
    assert all(bool((step[:, EOS] == -torch.inf).all()) for step in out.scores)


def test_embeddings_can_begin_a_text() -> None:
    for name in ("sambay", OFFICIAL):
        _, model = pair(name)
        rows = [random_ids(1, length, length)[0] for length in (8, 5)]
        ids, mask = padded(rows, "left")
        embeds = model.get_input_embeddings()(ids)
        found = generate(model, None, inputs_embeds=embeds, attention_mask=mask)
        assert torch.equal(found, generate(model, ids, attention_mask=mask)[:, 8:])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_models_without_attention_generate_with_their_states(options: dict[str, Any]) -> None:
    """No cache layer of theirs knows its length, for which transformers asks."""
    model = twin(tiny_model("sambay", dtype=torch.float32, layer_pattern="4xM"))
    rows = [random_ids(1, length, length)[0] for length in (10, 3, 7)]
    ids, mask = padded(rows, "left")
    calls: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    found = generate(model, ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    assert calls == [10] + [1] * (NEW - 1)
    for row, new in zip(rows, found, strict=True):
        alone = generate(model, row[None], use_cache=False, **options)[0, len(row) :]
        assert torch.equal(new, alone)


def test_embeddings_continue_a_cache() -> None:
    """And stand beside a static cache, and positions given by the caller change nothing."""
    _, model = pair("sambay")
    ids = random_ids(2, 6)
    expected = by_hand(model, ids)[:, 6:]
    embed = model.get_input_embeddings()
    begun = generate(model, None, 4, inputs_embeds=embed(ids), return_dict_in_generate=True)
    longer = torch.cat((embed(ids), embed(begun.sequences)), dim=1)
    options = {"attention_mask": torch.ones(2, 10), "past_key_values": begun.past_key_values}
    rest = generate(model, None, NEW - 4, inputs_embeds=longer, **options)
    assert torch.equal(torch.cat((begun.sequences, rest), dim=1), expected)
    static = {"cache_implementation": "static", "inputs_embeds": embed(ids)}
    assert torch.equal(generate(model, None, **static), expected)
    positions = torch.arange(6)[None].expand(2, -1)
    assert torch.equal(generate(model, ids, position_ids=positions)[:, 6:], expected)


def test_assisted_decoding_is_refused_by_transformers() -> None:
    """Recurrent states cannot be rolled back, and `_is_stateful` says so."""
    _, model = pair("sambay")
    with pytest.raises(ValueError, match="stateful"):
        generate(model, random_ids(1, 5), assistant_model=model)
    with pytest.raises(ValueError, match="stateful"):
        generate(model, random_ids(1, 5), prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("name", ["sambay", OFFICIAL])
def test_pipelines_read_a_folder(name: str, tmp_path: Path) -> None:
    _, model = pair(name)
    folder = save_with_tokenizer(model, tmp_path / "model")
    assert sambay.__version__
    writer = transformers.pipeline("text-generation", model=str(folder), device="cpu")
    prompts = ["w5 w9 w22 w3", "w30 w31"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    alone = [writer(prompt, **options)[0]["generated_text"] for prompt in prompts]
    together = writer(prompts, batch_size=2, **options)
    assert [row[0]["generated_text"] for row in together] == alone
    ids = tiny_tokenizer()(prompts[0], return_tensors="pt")["input_ids"]
    assert alone[0] == prompts[0] + tiny_tokenizer().decode(by_hand(model, ids, 5)[0, 4:])
