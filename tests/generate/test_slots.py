"""Slots give what the simple engine gives, whoever else is in them and whenever a request came."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sambay.errors import ConfigError
from sambay.generate import (
    Completion,
    Engine,
    Request,
    SamplingParams,
    SlotEngine,
    reference_generate,
)
from sambay.generate.memory import NotEnoughMemory, slots_bytes
from sambay.generate.requests import Pool, plan_pools
from sambay.model import LanguageModel
from tests import tiny
from tests.generate.scripted import ScriptedModel
from tests.tiny import FAMILY, VOCAB

pytestmark = pytest.mark.usefixtures("plenty")

SAMPLINGS = (
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=1.5, top_k=20, repetition_penalty=1.3, seed=2),
)


@cache
def tiny_model(name: str) -> LanguageModel:
    return tiny.tiny_model(name, dtype=torch.float32)


def mixed_requests(seed: int, count: int, longest: int = 17) -> list[Request]:
    """Prompts of 1 to `longest` tokens and 1 to 11 new ones: some end at once, some pass a ring."""
    chance = random.Random(seed)
    requests = []
    for i in range(count):
        prompt = chance.choices(range(VOCAB), k=chance.choice((1, 2, 7, 8, 8, longest)))
        requests.append(Request(prompt, chance.choice((1, 4, 7, 11)), SAMPLINGS[i % 3]))
    return requests


def capacity_of(requests: list[Request]) -> int:
    return max(len(r.prompt) + (r.max_new_tokens or 1) - 1 for r in requests)


def assert_equal(found: list[Completion], wanted: list[Completion]) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.tokens == theirs.tokens
        assert mine.finish_reason == theirs.finish_reason
        assert mine.logprobs == pytest.approx(theirs.logprobs, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", FAMILY)
def test_every_family_member_equals_the_simple_engine(name: str) -> None:
    model, requests = tiny_model(name), mixed_requests(1, 8)
    wanted = Engine(model).generate(requests)
    engine = SlotEngine(model, slots=3, capacity=capacity_of(requests), prefill_chunk=20)
    assert_equal(engine.generate(requests), wanted)
    tokens, _ = reference_generate(model, requests[0].prompt, requests[0].max_new_tokens or 1)
    assert wanted[0].tokens == tokens
    # The same slots again: what earlier texts left there is not seen.
    assert_equal(engine.generate(requests[::-1]), wanted[::-1])


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 2, 5, 40])
@pytest.mark.parametrize("chunk", [4, 35, 2048])
@pytest.mark.parametrize("name", ["transformer++", "transformer-ls", "sambay+da", "sambay-2"])
def test_many_shapes_equal_the_simple_engine(name: str, chunk: int, slots: int) -> None:
    model, requests = tiny_model(name), mixed_requests(slots, 25, longest=40)
    wanted = [Engine(model).generate([request])[0] for request in requests]
    engine = SlotEngine(model, slots=slots, capacity=60, prefill_chunk=chunk)
    assert_equal(engine.generate(requests), wanted)


def test_requests_may_come_at_any_time() -> None:
    model, requests = tiny_model("sambay"), mixed_requests(3, 6)
    engine = SlotEngine(model, slots=2, capacity=capacity_of(requests))
    waiting, found = list(requests), {}
    numbers = [engine.submit(waiting.pop(0))]
    while events := engine.step():
        for event in events:
            found.setdefault(event.request, Completion()).extend(event)
        if waiting:
            numbers.append(engine.submit(waiting.pop(0)))
        assert engine.num_running <= 2
    assert_equal([found[number] for number in numbers], Engine(model).generate(requests))
    assert (engine.num_running, engine.num_waiting) == (0, 0)


def test_a_cancelled_request_frees_its_slot_for_the_next() -> None:
    model = tiny_model("sambay")
    first, second, third = mixed_requests(5, 3)
    long = Request(first.prompt, 40)
    engine = SlotEngine(model, slots=1, capacity=60)
    running, waiting, last = engine.submit(long), engine.submit(second), engine.submit(third)
    assert {event.request for event in engine.step()} == {running}
    assert engine.cancel(waiting)
    assert engine.cancel(running)
    assert not engine.cancel(running)
    assert not engine.cancel(99)
    completion = Completion()
    while events := engine.step():
        for event in events:
            assert event.request == last
            completion.extend(event)
    assert_equal([completion], Engine(model).generate([third]))


def test_closing_a_stream_frees_all_slots() -> None:
    model = tiny_model("sambay")
    requests = [Request([i + 1, 2], 30) for i in range(5)]
    engine = SlotEngine(model, slots=2, capacity=40)
    events = engine.stream(requests)
    assert engine.num_waiting == 0, "nothing begins before the first token is read"
    next(events)
    assert (engine.num_running, engine.num_waiting) == (2, 3)
    other = engine.stream(requests[:1])
    with pytest.raises(ConfigError, match="at work; use submit and step"):
        next(other)
    events.close()
    assert (engine.num_running, engine.num_waiting) == (0, 0)
    assert_equal(engine.generate(requests[:1]), Engine(model).generate(requests[:1]))


def test_samples_of_one_prompt_share_its_prefill_across_refills() -> None:
    model = tiny_model("sambay+da")
    draws = [SamplingParams(temperature=1.5, seed=seed) for seed in range(7)]
    requests = [Request([5, 9, 2, 33, 8], 6, draw) for draw in draws]
    requests.append(Request([4, 4, 4], 6))
    engine = SlotEngine(model, slots=2, capacity=12)
    completions = engine.generate(requests)
    assert engine.timings.prefill_tokens == 5 + 3
    assert engine.timings.decode_tokens == 8 * 5
    assert_equal(completions, [Engine(model).generate([request])[0] for request in requests])


def test_a_prompt_longer_than_a_chunk_is_prefilled_in_place() -> None:
    model = tiny_model("sambay")
    requests = [Request(list(range(1, 30)), 5), Request(list(range(1, 30)), 3)]
    engine = SlotEngine(model, slots=2, capacity=40, prefill_chunk=8)
    assert_equal(engine.generate(requests), Engine(model).generate(requests))
    assert engine.timings.prefill_tokens == 29


def test_steps_become_narrower_when_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, widths = tiny_model("swa+yoco"), []
    decode = LanguageModel.decode

    def spy(self: LanguageModel, tokens_B: torch.Tensor, *rest: Any) -> torch.Tensor:
        widths.append(len(tokens_B))
        return decode(self, tokens_B, *rest)

    monkeypatch.setattr(LanguageModel, "decode", spy)
    # The first slots end first, so that rows have to move to lower ones.
    requests = [Request([i + 1, 7, i + 3, 4, 4, 2, 1], 2 + 2 * i) for i in range(6)]
    # Captured steps do not call the model, but the step is as wide.
    completions = SlotEngine(model, slots=6, capacity=40, capture=False).generate(requests)
    assert_equal(completions, Engine(model).generate(requests))
    assert widths == [6, 6, 6, 4, 4, 3, 3, 2, 2, 1, 1]


def test_idle_slots_cannot_disturb_the_others() -> None:
    model, requests = tiny_model("transformer-ls"), mixed_requests(8, 2)
    for name in ("transformer-ls", "sambay+da", "s-gdny"):
        model = tiny_model(name)
        engine = SlotEngine(model, slots=4, capacity=40)
        with torch.inference_mode():
            for state in engine._cache._states:
                for buffer in state.buffers.values():
                    buffer.fill_(torch.nan)
        assert_equal(engine.generate(requests), Engine(model).generate(requests))


def test_stop_tokens_observers_and_full_slots_end_their_own_row() -> None:
    model = tiny_model("sambay")
    free, _ = reference_generate(model, [3, 1, 4], 12)
    place = next(i for i in range(3, 12) if free[i] not in free[:i])
    heard: list[int] = []

    def third(token: int) -> bool:
        heard.append(token)
        return len(heard) == 3

    requests = [
        Request([3, 1, 4], 10, stop_token_ids={free[place]}),
        Request([3, 1, 4], 10, stop_when=third),
        Request([3, 1, 4], None),
    ]
    ended: list[int] = []
    engine = SlotEngine(model, slots=3, capacity=12)
    stopped, observed, full = engine.generate(requests, lambda number, _: ended.append(number))
    assert (stopped.tokens, stopped.finish_reason) == (free[: place + 1], "stop")
    assert (observed.tokens, observed.finish_reason) == (free[:3], "stop")
    assert heard == free[:3]
    # Three columns are the prompt's, nine are fed back; the token behind them ends the row.
    assert (full.tokens, full.finish_reason) == (free[:10], "length")
    assert ended == [1, 0, 2]


def test_the_cross_decoder_sees_one_column_of_each_prompt() -> None:
    model = ScriptedModel([7, 7], prompt_length=23)
    requests = [Request([i] * 23, 2) for i in range(3)]
    settings: Any = {"slots": 2, "capacity": 24, "prefill_chunk": 20, "capture": False}
    SlotEngine(model, **settings).generate(requests)  # pyright: ignore
    prefill = [(20, "none"), (3, "last")]
    assert model.calls == [*prefill, *prefill, (1, "decode"), *prefill, (1, "decode")]


def test_bfloat16_models_run() -> None:
    for name in ("sambay+da", "transformer++", "sambay-2"):
        model = tiny.tiny_model(name, dtype=torch.bfloat16)
        requests = [Request([1, 2, 3], 9), Request([4], 9)]
        found = SlotEngine(model, slots=2, capacity=12).generate(requests)
        assert [len(completion.tokens) for completion in found] == [9, 9]


def test_what_is_too_long_is_refused_with_what_would_do() -> None:
    engine = SlotEngine(tiny_model("sambay"), slots=2, capacity=10)
    engine.stream([Request([1, 2, 3], 8)])
    with pytest.raises(ConfigError, match=r"prompt 1 has 3 tokens and wants 9.* capacity=11"):
        engine.stream([Request([1], 3), Request([1, 2, 3], 9)])
    with pytest.raises(ConfigError, match="prompt 0 is empty"):
        engine.submit(Request([], 3))
    assert engine.num_waiting == 0
    for settings in ({"slots": 0}, {"capacity": 0}, {"prefill_chunk": 0}):
        with pytest.raises(ConfigError, match=f"{next(iter(settings))} is 0"):
            SlotEngine(tiny_model("sambay"), **({"slots": 1, "capacity": 1} | settings))
    with pytest.raises(ConfigError, match=r"in torch.float64; .* model.float\(\)"):
        SlotEngine(tiny.tiny_model("sambay"), slots=1, capacity=1)


def test_too_little_memory_is_said_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("transformer++")

    def need(slots: int, capacity: int) -> int:
        return slots_bytes(model.config, slots, capacity, chunk=2048, value_bytes=4)

    name = "sambay.generate.slot_engine.available_bytes"
    monkeypatch.setattr(name, lambda device: need(3, 10_000))
    SlotEngine(model, slots=3, capacity=10_000)
    with pytest.raises(NotEnoughMemory) as refused:
        SlotEngine(model, slots=5, capacity=10_000)
    text = str(refused.value)
    assert text.startswith("5 slots x 10000 columns")
    assert "3 slots of 10000 columns or 5 slots of " in text
    most = int(text.split("5 slots of ")[1].split()[0])
    assert need(5, most) <= need(3, 10_000) < need(5, most + 1)
    with pytest.raises(NotEnoughMemory, match=r"available; 2 slots of \d+ columns would fit"):
        SlotEngine(model, slots=2, capacity=10_000_000)
    monkeypatch.setattr(name, lambda device: 10)
    with pytest.raises(NotEnoughMemory, match="use a machine with more memory"):
        SlotEngine(model, slots=1, capacity=1)


def test_planned_memory_is_that_of_the_buffers() -> None:
    model = tiny_model("sambay")
    small = SlotEngine(model, slots=2, capacity=50).cache_bytes
    large = SlotEngine(model, slots=2, capacity=150).cache_bytes
    grown = [
        slots_bytes(model.config, 2, capacity, chunk=1, value_bytes=4) for capacity in (50, 150)
    ]
    assert large - small == grown[1] - grown[0] > 0


def test_pools_keep_short_requests_out_of_long_slots_where_memory_is_scarce() -> None:
    lengths, new = [100, 5, 7, 90, 2, 40], [10, 5, 3, 10, 5, 10]
    assert plan_pools(lengths, new, 4, lambda slots, capacity: True) == [
        Pool(4, 110, [0, 3, 5, 2, 1, 4])
    ]
    scarce = plan_pools(lengths, new, 4, lambda slots, capacity: slots * capacity <= 120)
    assert scarce == [Pool(1, 110, [0, 3]), Pool(1, 50, [5]), Pool(3, 10, [2, 1, 4])]
    nothing = plan_pools(lengths, new, 4, lambda slots, capacity: False)
    assert all(pool.num_slots == 1 for pool in nothing)
    assert sorted(number for pool in nothing for number in pool.numbers) == list(range(6))
    assert plan_pools([], [], 4, lambda slots, capacity: True) == []


@torch.no_grad()
def test_weights_that_changed_are_noticed_instead_of_being_half_used() -> None:
    request = Request([1, 2, 3], 2)
    for change in (
        lambda model: model.blocks[0].mixer.in_proj.weight.mul_(2),
        lambda model: model.bfloat16(),
        lambda model: model.load_state_dict(
            dict(tiny_model("sambay+da").state_dict()), assign=True
        ),
    ):
        model = tiny_model("sambay+da")
        engine = SlotEngine(model, slots=1, capacity=8)
        engine.generate([request])
        change(model)
        with pytest.raises(ConfigError, match="make another one"):
            engine.submit(request)


def test_the_engine_says_how_it_steps() -> None:
    model = tiny_model("sambay")
    engine = SlotEngine(model, slots=1, capacity=4)
    assert engine.step_mode == "captured"
    assert SlotEngine(model, slots=1, capacity=4, capture=False).step_mode == "plain (not wanted)"
    # Widths of captured steps are few; the next larger one serves.
    step: Any = engine._step
    step._graphs = {1: None, 2: None, 4: None, 6: None}
    assert [step.width(count) for count in range(1, 7)] == [1, 2, 4, 4, 6, 6]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["transformer++", "sambay", "sambay+da", "sambay-2", "s-gdny"])
def test_captured_steps_give_what_plain_ones_give(name: str) -> None:
    requests = mixed_requests(4, 9)
    model = tiny.tiny_model(name, dtype=torch.float32).cuda()
    captured = SlotEngine(model, slots=3, capacity=40)
    assert captured.step_mode == "captured"
    plain = SlotEngine(model, slots=3, capacity=40, capture=False)
    assert_equal(captured.generate(requests), plain.generate(requests))
    assert_equal(captured.generate(requests), Engine(tiny_model(name)).generate(requests))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's memory counter")
def test_memory_stays_flat_over_many_tokens() -> None:
    engine = SlotEngine(tiny_model("sambay"), slots=4, capacity=512)
    chance = random.Random(0)

    def batch() -> list[Request]:
        return [
            Request(chance.choices(range(VOCAB), k=chance.randint(1, 100)), chance.randint(1, 400))
            for _ in range(40)
        ]

    engine.generate(batch())
    before = resident_bytes()
    for _ in range(2):
        engine.generate(batch())
    assert engine.timings.decode_tokens > 15_000
    assert resident_bytes() - before < 4 << 20
