"""A kept cache gives what computing the whole text anew gives."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from sambay.errors import ConfigError
from sambay.generate import Engine, Request, SamplingParams
from sambay.generate.decode_step import DecodeStep
from sambay.generate.memory import NotEnoughMemory
from sambay.generate.session import Session
from sambay.ops.native.library import why_unavailable
from tests import tiny


def model(name: str = "sambay+da") -> Any:
    return tiny.tiny_model(name, dtype=torch.float32)


def answer(session: Session, request: Request, take: int | None = None) -> list[int]:
    tokens = []
    for event in session.stream(request):
        tokens.append(event.token)
        if len(tokens) == take:
            break
    return tokens


@pytest.mark.parametrize("name", ["sambay+da", "samba+yoco", "transformer++", "mambay"])
def test_continued_equals_recomputed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns of random length, some abandoned, with a cache that has to grow on the way."""
    monkeypatch.setattr("sambay.generate.session.FIRST_GROWTH", 3)
    engine = Engine(model(name), prefill_chunk=4)
    session = Session(engine)
    dice = random.Random(5)
    text: list[int] = []
    for turn in range(6):
        text += [dice.randrange(tiny.VOCAB) for _ in range(dice.choice((1, 3, 9)))]
        warm = SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.1, seed=turn)
        request = Request(text, dice.choice((1, 7, 12)), warm if turn % 2 else SamplingParams())
        held = session.length
        before = engine.timings.prefill_tokens
        produced = answer(session, request, take=dice.choice((None, 4)))
        assert engine.timings.prefill_tokens - before == len(text) - held
        whole = Engine(engine.model).generate([request])[0].tokens
        assert produced == whole[: len(produced)]
        assert session.length == len(text) + len(produced) - 1
        text += produced
    assert session.length > 30


def test_another_text_starts_anew() -> None:
    session = Session(Engine(model()))
    for prompt in ([1, 2, 3], [1, 2, 4], [1], [1], [7, 8]):
        request = Request(prompt, 6)
        assert answer(session, request) == Engine(model()).generate([request])[0].tokens
        assert session.length == len(prompt) + 5
    session.reset()
    assert session.length == 0


def test_an_interrupted_forward_leaves_no_half_state() -> None:
    engine = Engine(model())
    session = Session(engine)
    first = answer(session, Request([1, 2, 3], 4))
    text = [1, 2, 3, *first, 5]
    norm = engine.model.blocks[5].mixer_norm

    def press_ctrl_c(*_: object) -> None:
        raise KeyboardInterrupt

    handle = norm.register_forward_pre_hook(press_ctrl_c)  # after several states were written
    with pytest.raises(KeyboardInterrupt):
        answer(session, Request(text, 4))
    handle.remove()
    assert session.length == 0
    assert answer(session, Request(text, 9)) == engine.generate([Request(text, 9)])[0].tokens


def test_mistakes() -> None:
    session = Session(Engine(model()))
    answer(session, Request([1, 2], 3))
    held = session.length
    with pytest.raises(ConfigError, match="outside the model's vocabulary"):
        session.stream(Request([1, 2, tiny.VOCAB], 3))
    assert session.length == held
    with pytest.raises(ConfigError, match="prompt 0 is empty"):
        session.stream(Request([], 3))


def test_memory_is_asked_first_and_ends_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sambay.generate.session.FIRST_GROWTH", 8)
    session = Session(Engine(model()))
    stream = session.stream(Request([1, 2], None))
    monkeypatch.setattr("sambay.generate.session.available_bytes", lambda device: 0)
    events = list(stream)
    assert [event.finish_reason for event in events[-2:]] == [None, "length"]
    assert session.length == 2 + len(events) - 1 == 10
    monkeypatch.setattr("sambay.generate.memory.available_bytes", lambda device: 0)
    with pytest.raises(NotEnoughMemory, match="shorten the prompt"):
        session.stream(Request([*range(40)], 3))


def test_weights_that_changed_meanwhile_are_what_continues() -> None:
    engine = Engine(model())
    session = Session(engine)
    text = [1, 2, 3, *answer(session, Request([1, 2, 3], 5)), 4]
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.mul_(1.5)
    assert (
        answer(session, Request(text, 9))
        == Engine(engine.model).generate([Request(text, 9)])[0].tokens
    )


def test_steps_are_captured_and_again_when_the_slot_has_grown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sambay.generate.session.FIRST_GROWTH", 4)
    made: list[DecodeStep] = []

    class Counted(DecodeStep):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            made.append(self)

    monkeypatch.setattr("sambay.generate.session.DecodeStep", Counted)
    request = Request([1, 2, 3], 40)
    engine = Engine(model())
    assert answer(Session(engine), request) == engine.generate([request])[0].tokens
    assert len(made) > 2
    reason = why_unavailable()
    assert all(step.why_not_captured == reason for step in made)
