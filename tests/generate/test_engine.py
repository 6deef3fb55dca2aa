"""The cached engine equals generation without a cache, whatever the batch looks like."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from sambay.errors import ConfigError, SambayError
from sambay.generate import (
    Completion,
    Engine,
    Request,
    SamplingParams,
    SlotEngine,
    reference_generate,
)
from sambay.generate import engine as engine_module
from sambay.generate.memory import slots_bytes
from sambay.model import LanguageModel, ModelCache
from sambay.spec.footprint import cache_bytes
from tests import tiny
from tests.generate.scripted import ScriptedModel
from tests.tiny import NAMES, VOCAB

pytestmark = pytest.mark.usefixtures("plenty")


@cache
def tiny_model(name: str) -> LanguageModel:
    return tiny.tiny_model(name, dtype=torch.float32)


def random_prompts(seed: int, count: int, longest: int = 23) -> list[list[int]]:
    chance = random.Random(seed)
    lengths = [1, longest] + [chance.randint(1, longest) for _ in range(count - 2)]
    chance.shuffle(lengths)
    return [[chance.randrange(VOCAB) for _ in range(length)] for length in lengths]


class Twin:
    """What a prompt must give, computed without a cache."""

    def __init__(self, model: LanguageModel, prompt: list[int], most: int) -> None:
        self.tokens, logits = reference_generate(model, prompt, most)
        self.logprobs = logits.log_softmax(-1)[range(most), self.tokens].tolist()
        best = logits.topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-4, "too close to call: choose another seed"

    def assert_equal(self, completion: Completion) -> None:
        assert completion.tokens == self.tokens
        assert completion.logprobs == pytest.approx(self.logprobs, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_every_family_member_equals_uncached_generation(name: str) -> None:
    model = tiny_model(name)
    prompts = random_prompts(seed=1, count=5)
    limits = [9, 3, 1, 7, 5]
    requests = [Request(p, n) for p, n in zip(prompts, limits, strict=True)]
    twins = [Twin(model, p, n) for p, n in zip(prompts, limits, strict=True)]
    for prefill_chunk in (4, 35, 2048):
        engine = Engine(model, prefill_chunk=prefill_chunk)
        completions = engine.generate(requests)
        for twin, completion in zip(twins, completions, strict=True):
            assert completion.finish_reason == "length"
            twin.assert_equal(completion)


@pytest.mark.parametrize("max_batch_size", [1, 2, 4, 100])
def test_generate_many_keeps_the_order_and_tells_each_end(max_batch_size: int) -> None:
    model = tiny_model("sambay")
    prompts = random_prompts(seed=2, count=9)
    requests = [Request(p, 1 + i) for i, p in enumerate(prompts)]
    told: dict[int, list[int]] = {}

    def on_finished(number: int, completion: Completion) -> None:
        assert number not in told
        assert completion.finish_reason == "length"
        told[number] = list(completion.tokens)

    completions = Engine(model).generate_many(
        requests, max_batch_size=max_batch_size, on_finished=on_finished
    )
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        Twin(model, prompt, 1 + i).assert_equal(completion)
        assert told[i] == completion.tokens


def test_generate_many_obeys_a_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("sambay")
    requests = [Request(p, 4) for p in random_prompts(seed=3, count=8)]
    made: list[tuple[int, int]] = []

    class Spy(SlotEngine):
        def __init__(self, model: LanguageModel, **settings: Any) -> None:
            made.append((settings["slots"], settings["capacity"]))
            super().__init__(model, **settings)

    monkeypatch.setattr(engine_module, "SlotEngine", Spy)
    engine = Engine(model)
    limit = slots_bytes(model.config, 3, 26, chunk=engine.prefill_chunk, value_bytes=4)
    completions = engine.generate_many(requests, max_batch_size=100, max_bytes=limit)
    assert [len(completion.tokens) for completion in completions] == [4] * 8
    assert made[0] == (3, 26)
    for slots, capacity in made:
        need = slots_bytes(model.config, slots, capacity, chunk=2048, value_bytes=4)
        assert need <= limit


def test_generate_many_without_a_limit_runs_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("sambay")
    prompts = random_prompts(seed=3, count=5)
    engine, sizes = Engine(model), []
    run = engine._run

    def spy(numbers: Any, requests: Any, prompts: Any) -> Any:
        sizes.append(len(numbers))
        return run(numbers, requests, prompts)

    monkeypatch.setattr(engine, "_run", spy)
    heard: list[int] = []

    def enough(token: int) -> bool:
        heard.append(token)
        return len(heard) == 6

    requests = [Request(prompts[0], None, stop_when=enough), *(Request(p, 4) for p in prompts[1:])]
    completions = engine.generate_many(requests, max_batch_size=2)
    assert sizes == [2, 2, 1]
    assert [len(completion.tokens) for completion in completions] == [6, 4, 4, 4, 4]
    Twin(model, prompts[0], 6).assert_equal(completions[0])


def test_sampled_rows_do_not_depend_on_their_company() -> None:
    model = tiny_model("sambay+da")
    settings = [
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=1.5, top_k=20, seed=2),
        SamplingParams(),
        SamplingParams(temperature=2.0, top_p=0.9, repetition_penalty=1.3, seed=2**62),
        SamplingParams(temperature=1.0, seed=1),
    ]
    prompts = random_prompts(seed=4, count=5)
    requests = [
        Request(p, 9 + i, s) for i, (p, s) in enumerate(zip(prompts, settings, strict=True))
    ]
    together = Engine(model).generate(requests)
    for request, completion in zip(requests, together, strict=True):
        alone = Engine(model, prefill_chunk=3).generate([request])[0]
        assert alone.tokens == completion.tokens
        assert alone.logprobs == pytest.approx(completion.logprobs, abs=1e-4)
    other_seed = Request(prompts[0], 9, SamplingParams(temperature=1.0, seed=3))
    assert Engine(model).generate([other_seed])[0].tokens != together[0].tokens


def test_the_penalty_counts_prompt_and_continuation() -> None:
    model = tiny_model("transformer++")
    prompt = random_prompts(seed=10, count=2, longest=9)[1]
    ids = list(prompt)
    for _ in range(20):
        logits = model(torch.tensor([ids]))[0, -1]
        for token in set(ids):
            logits[token] *= 1.0 if logits[token] == 0 else 3.0 ** (-1 if logits[token] > 0 else 1)
        ids.append(int(logits.argmax()))
    penalty = SamplingParams(repetition_penalty=3.0)
    tokens = Engine(model).generate([Request(prompt, 20, penalty)])[0].tokens
    assert tokens == ids[len(prompt) :]
    assert tokens != Engine(model).generate([Request(prompt, 20)])[0].tokens


def test_samples_of_one_prompt_share_its_prefill() -> None:
    model = tiny_model("sambay")
    prompt, other = random_prompts(seed=5, count=2)
    draws = [SamplingParams(temperature=1.5, seed=seed) for seed in range(4)]
    requests = [Request(prompt, 8, draw) for draw in draws]
    requests.insert(2, Request(other, 8))
    engine = Engine(model)
    completions = engine.generate(requests)
    assert engine.timings.prefill_tokens == len(prompt) + len(other)
    for request, completion in zip(requests, completions, strict=True):
        assert completion.tokens == Engine(model).generate([request])[0].tokens
    assert len({tuple(completion.tokens) for completion in completions}) == 5


@pytest.mark.parametrize("name", ["samba", "sambay"])
def test_without_a_limit_the_cache_grows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "FIRST_GROWTH", 1)
    reserved: list[int] = []
    reserve = ModelCache.reserve
    monkeypatch.setattr(
        ModelCache, "reserve", lambda self, n: (reserved.append(n), reserve(self, n))[1]
    )
    model = tiny_model(name)
    prompts = random_prompts(seed=6, count=3, longest=2)  # columns begin below the window
    heard: list[int] = []

    def enough(token: int) -> bool:
        heard.append(token)
        return len(heard) == 31

    alone = Engine(model).generate([Request(prompts[0], None, stop_when=enough)])[0]
    assert heard == alone.tokens
    Twin(model, prompts[0], 31).assert_equal(alone)
    heard.clear()
    requests = [Request(prompts[0], None, stop_when=enough), Request(prompts[1], 12)]
    unlimited, limited = Engine(model).generate(requests)
    assert (unlimited.finish_reason, limited.finish_reason) == ("stop", "length")
    assert heard == unlimited.tokens
    Twin(model, prompts[0], 31).assert_equal(unlimited)
    Twin(model, prompts[1], 12).assert_equal(limited)
    assert len(reserved) >= 2


def test_without_a_limit_the_end_of_memory_ends_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "FIRST_GROWTH", 10)
    engine = Engine(tiny_model("sambay"))
    room = engine._batch_bytes(2, 3 + 10) + 1
    monkeypatch.setattr(engine_module, "available_bytes", lambda device: room)
    completions = engine.generate([Request([1, 2, 3], None), Request([4, 5], None)])
    assert [c.finish_reason for c in completions] == ["length"] * 2
    # Ten tokens are stored behind the prompt; the one chosen after the last of them ends the row.
    assert [len(c.tokens) for c in completions] == [11, 11]


@pytest.mark.parametrize("name", ["transformer++", "samba", "sambay+da"])
def test_the_cache_is_allocated_once_and_exactly(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[ModelCache] = []
    allocate = ModelCache.allocate

    def spy(*args: Any, **kwargs: Any) -> ModelCache:
        caches.append(allocate(*args, **kwargs))
        return caches[-1]

    monkeypatch.setattr(ModelCache, "allocate", spy)
    model = tiny_model(name)
    requests = [Request(p, n) for p, n in zip(random_prompts(7, 4), (3, 3, 3, 3), strict=True)]
    events = Engine(model).stream(requests)
    next(events)
    # 23 prompt columns, and all of three new tokens but the last, which is never fed back.
    assert [c.nbytes for c in caches] == [cache_bytes(model.config, 4, 25, kv_bytes=4)]
    assert sum(1 for _ in events) == 11
    assert len(caches) == 1
    assert caches[0].length == 25


def test_only_the_last_prompt_column_reaches_the_cross_decoder() -> None:
    model = ScriptedModel([7], prompt_length=23)
    requests = [Request(p, 2) for p in random_prompts(seed=8, count=2)]
    model.engine(prefill_chunk=20).generate(requests)
    assert model.calls == [(10, "none"), (10, "none"), (3, "last"), (1, "last")]


def test_stop_tokens_and_observers_end_their_own_row() -> None:
    model = tiny_model("sambay")
    prompt = random_prompts(seed=9, count=2)[0]
    free, _ = reference_generate(model, prompt, 12)
    place = next(i for i in range(3, 12) if free[i] not in free[:i])
    heard: list[int] = []

    def third(token: int) -> bool:
        heard.append(token)
        return len(heard) == 3

    requests = [
        Request(prompt, 12, stop_token_ids={free[place]}),
        Request(prompt, 12),
        Request(prompt, 12, stop_when=third),
        Request(prompt, place + 1, stop_token_ids={free[place]}),
    ]
    stopped, whole, observed, both = Engine(model).generate(requests)
    assert (stopped.tokens, stopped.finish_reason) == (free[: place + 1], "stop")
    assert (whole.tokens, whole.finish_reason) == (free, "length")
    assert (observed.tokens, observed.finish_reason) == (free[:3], "stop")
    assert heard == free[:3]
    assert (both.tokens, both.finish_reason) == (free[: place + 1], "stop")


def test_finished_rows_leave_the_batch() -> None:
    model = tiny_model("sambay")
    sizes: list[int] = []
    hook = model.embedding.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    try:
        Engine(model).generate([Request([i + 1, i + 2], 2 + 2 * i) for i in range(6)])
    finally:
        hook.remove()
    # Before decode step n, n tokens are out; rows leave together once a quarter is idle.
    wanted, size = [], 6
    for produced in range(1, 12):
        alive = sum(2 + 2 * i > produced for i in range(6))
        size = alive if alive <= 0.75 * size else size
        wanted.append(size)
    assert sizes[1:] == wanted == [6, 6, 6, 4, 4, 3, 3, 2, 2, 1, 1]


def test_scarce_memory_costs_speed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room for copies, prompts are not shared and finished rows stay."""
    model = tiny_model("sambay")
    prompt, other = random_prompts(seed=11, count=2)
    requests = [Request(prompt, 2), Request(prompt, 9), Request(other, 2)]
    wanted = Engine(model).generate(requests)
    engine = Engine(model)
    need = engine._batch_bytes(3, 23 + 8)
    for module in ("memory", "engine"):
        monkeypatch.setattr(f"sambay.generate.{module}.available_bytes", lambda device: need)
    # Once the cache is allocated hardly anything is left.
    allocate = ModelCache.allocate

    def take_all(*args: Any, **kwargs: Any) -> ModelCache:
        monkeypatch.setattr(engine_module, "available_bytes", lambda device: 10)
        return allocate(*args, **kwargs)

    monkeypatch.setattr(ModelCache, "allocate", take_all)
    sizes: list[int] = []
    hook = model.embedding.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    try:
        completions = engine.generate(requests)
    finally:
        hook.remove()
    assert sizes == [3] * 9
    assert [c.tokens for c in completions] == [c.tokens for c in wanted]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_can_be_trained_after_it_has_generated(name: str) -> None:
    model = tiny.tiny_model(name, dtype=torch.float32)
    Engine(model).generate([Request([1, 2, 3], 4)])
    model(torch.tensor([[1, 2, 3, 4, 5, 6, 7]])).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_streaming_is_ordered_lazy_and_leaves_no_mode_behind() -> None:
    model = ScriptedModel([3, 5, 7, 9], prompt_length=2)
    engine = model.engine()
    events = engine.stream([Request([1, 2], 3), Request([2, 3], 2)])
    assert model.calls == []
    first = next(events)
    assert len(model.calls) == 1
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    rest = [(e.request, e.token, e.finish_reason) for e in events]
    assert (first.request, first.token, first.finish_reason) == (0, 3, None)
    assert rest == [(1, 3, None), (0, 5, None), (1, 5, "length"), (0, 7, "length")]
    assert engine.timings.decode_tokens == 3
    assert engine.timings.prefill_tokens == 4


def test_bfloat16_models_keep_bfloat16_keys() -> None:
    model = tiny.tiny_model("sambay", dtype=torch.bfloat16)
    engine = Engine(model)
    assert engine.dtype == torch.bfloat16
    completion = engine.generate([Request([1, 2, 3], 9), Request([4], 9)])[0]
    assert len(completion.tokens) == 9


@pytest.mark.filterwarnings("error")
def test_prompts_may_be_lists_arrays_or_tensors() -> None:
    engine = Engine(tiny_model("sambay"))
    ids = [5, 9, 2, 33]
    frozen = np.array(ids, dtype=np.uint32)
    frozen.flags.writeable = False
    forms = [ids, tuple(ids), range(2, 6), frozen, torch.tensor(ids, dtype=torch.int32)]
    completions = engine.generate([Request(form, 5) for form in forms])
    assert [c.tokens for c in completions[3:]] == [completions[0].tokens] * 2
    assert engine.timings.prefill_tokens == 8  # four spellings of one prompt, and the range


def test_no_requests_give_no_completions() -> None:
    engine = Engine(tiny_model("sambay"))
    assert engine.generate([]) == []
    assert engine.generate_many([], max_batch_size=4) == []
    assert list(engine.stream([])) == []


def test_bad_engine_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="prefill_chunk is 0"):
        Engine(tiny_model("sambay"), prefill_chunk=0)
    with pytest.raises(ConfigError, match=r"model is in torch.float64; .* model.float\(\)"):
        Engine(tiny.tiny_model("sambay", dtype=torch.float64))
    with pytest.raises(ConfigError, match="max_batch_size is 0"):
        Engine(tiny_model("sambay")).generate_many([Request([1], 1)], max_batch_size=0)


def test_outputs_that_are_no_numbers_are_reported() -> None:
    model = ScriptedModel([1], prompt_length=1)
    model.logits = lambda h_BTD: torch.full((len(h_BTD), 1, VOCAB), torch.nan)
    with pytest.raises(SambayError, match="output for prompt 0 is not a number after 0 tokens"):
        model.engine().generate([Request([1], 3)])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["transformer++", "sambay", "sambay+da"])
def test_a_gpu_gives_what_the_cpu_gives(name: str) -> None:
    prompts = random_prompts(seed=12, count=5)
    settings = [
        SamplingParams(),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.0, top_k=9),
        SamplingParams(temperature=1.0, top_p=0.8),
        SamplingParams(repetition_penalty=1.5),
    ]
    requests = [Request(p, 20, s) for p, s in zip(prompts, settings, strict=True)]
    on_cpu = Engine(tiny_model(name)).generate(requests)
    on_gpu = Engine(tiny.tiny_model(name, dtype=torch.float32).cuda()).generate(requests)
    assert [c.tokens for c in on_gpu] == [c.tokens for c in on_cpu]
