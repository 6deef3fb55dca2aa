"""vLLM's engine says what the model says, token by token, whatever it does with the batch."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from sambay.model import LanguageModel
from sambay.model.folder import save_model_folder
from sambay.spec.named import named
from tests.serve.served_models import (
    NEEDS_VLLM,
    Engine,
    Served,
    largest_error,
    mixed_prompts,
    served,
)

pytestmark = [NEEDS_VLLM, pytest.mark.timeout(1800)]
NEW = 8
ALL_THREE = {
    "enable_prefix_caching": True, "kv_sharing_fast_prefill": True, "max_num_batched_tokens": 160,
}  # fmt: skip


@pytest.fixture(scope="module")
def differential(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """SambaY with differential attention, as it is released, in the native layout."""
    return served("sambay+da", tmp_path_factory.mktemp("differential") / "model", new=NEW)


def test_one_batch_of_32_prompts_and_its_log_probabilities(differential: Served) -> None:
    engine = Engine(differential.folder)
    try:
        outputs = engine.generate(differential.prompts, NEW, logprobs=5)
        assert [list(o.outputs[0].token_ids) for o in outputs] == differential.tokens
        assert largest_error(outputs, differential) < 1e-4
        # One by one is no different from all at once.
        some = slice(10, 14)
        alone = [engine.tokens([prompt], NEW)[0] for prompt in differential.prompts[some]]
        assert alone == differential.tokens[some]
        refuses_what_cannot_be(engine, differential)
    finally:
        engine.close()


def refuses_what_cannot_be(engine: Engine, model: Served) -> None:
    """A prompt longer than the context is refused, and the next one is answered."""
    with pytest.raises(Exception, match="maximum context length is 512"):
        engine.tokens([[1] * 600], NEW)
    assert engine.tokens(model.prompts[:1], NEW) == model.tokens[:1]


def test_caching_chunks_and_fast_prefill_together_with_hits_and_turns(differential: Served) -> None:
    engine = Engine(differential.folder, **ALL_THREE)
    try:
        assert engine.tokens(differential.prompts, NEW) == differential.tokens
        again = engine.generate(differential.prompts, NEW, logprobs=5)
        assert [list(o.outputs[0].token_ids) for o in again] == differential.tokens
        assert largest_error(again, differential) < 1e-4
        hits = [o.num_cached_tokens for o in again]
        assert sum(hit > 0 for hit in hits) >= 12, hits  # those longer than one page of the cache
        second_turn_equals_a_fresh_text(engine, differential)
    finally:
        engine.close()


def second_turn_equals_a_fresh_text(engine: Engine, model: Served) -> None:
    """The answer and a new question behind a cached conversation."""
    from sambay.generate.reference import reference_generate

    turns = [p + t + [5, 6, 7] for p, t in zip(model.prompts, model.tokens, strict=True)][-8:]
    expected = [reference_generate(model.model, turn, NEW)[0] for turn in turns]
    outputs = engine.generate(turns, NEW)
    assert [list(o.outputs[0].token_ids) for o in outputs] == expected
    assert any(o.num_cached_tokens > 0 for o in outputs)


def test_requests_that_were_thrown_out_come_back_with_the_same_text(tmp_path: Path) -> None:
    """So few pages that running requests lose theirs and start again."""
    model = served("sambay", tmp_path / "model", new=90)
    prompts, tokens = model.prompts[4:16], model.tokens[4:16]
    engine = Engine(model.folder, num_gpu_blocks_override=60, disable_log_stats=False)
    try:
        assert engine.tokens(prompts, 90) == tokens
        assert preemptions(engine) > 0
    finally:
        engine.close()


def preemptions(engine: Engine) -> int:
    """How often the scheduler took a request's pages away."""
    metrics = {metric.name: metric for metric in engine.llm.get_metrics()}
    return metrics["vllm:num_preemptions"].value


@pytest.mark.parametrize("name", ["transformer-ls", "sambay-mlp"])
def test_other_members_of_the_family(name: str, tmp_path: Path) -> None:
    every_prompt_of(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "sambay", "transformer++", "samba", "swa+yoco", "samba+yoco", "mambay", "sambay-a",
        "sambay-aa", "sambay-2", "gdny", "s-gdny+gdn", "sambay-2+nb",
    ],
)  # fmt: skip
def test_the_whole_family(name: str, tmp_path: Path) -> None:
    every_prompt_of(name, tmp_path)


def every_prompt_of(name: str, folder: Path) -> None:
    model = served(name, folder / "model", new=NEW)
    engine = Engine(model.folder, enable_prefix_caching=True)
    try:
        for _ in range(2):
            outputs = engine.generate(model.prompts, NEW, logprobs=3)
            assert [list(o.outputs[0].token_ids) for o in outputs] == model.tokens
            assert largest_error(outputs, model) < 1e-4
        assert any(output.num_cached_tokens > 0 for output in outputs)
    finally:
        engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sambay-20m", "sambay+da-20m", "transformer++-20m"])
def test_twenty_million_parameters(name: str, tmp_path: Path) -> None:
    """Models as they are measured, longer answers, against our engine's slots."""
    from sambay.generate import Engine as OwnEngine
    from sambay.generate import Request

    torch.manual_seed(0)
    model = LanguageModel(named(name)).eval()
    save_model_folder(tmp_path / "model", model)
    prompts, new = mixed_prompts(), 64
    own = OwnEngine(model).generate_many([Request(p, new) for p in prompts], max_batch_size=8)
    expected = [completion.tokens for completion in own]
    # Without cross-attention there is nothing that a fast prefill could leave out.
    without = "transformer" in name
    together = {k: v for k, v in ALL_THREE.items() if not (without and "fast_prefill" in k)}
    for options in ({}, together):
        engine = Engine(tmp_path / "model", **options)
        try:
            assert engine.tokens(prompts, new) == expected, options
        finally:
            engine.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"enable_prefix_caching": True},
        {"max_num_batched_tokens": 48},
        {"kv_sharing_fast_prefill": True},
        {"max_num_batched_tokens": 48, "kv_sharing_fast_prefill": True},
    ],
    ids=["caching", "chunks", "fast prefill", "chunks and fast prefill"],
)
def test_each_way_alone(options: dict[str, object], differential: Served) -> None:
    engine = Engine(differential.folder, **options)
    try:
        for _ in range(2):
            assert engine.tokens(differential.prompts, NEW) == differential.tokens
    finally:
        engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, ALL_THREE], ids=["plain", "all three"])
def test_compiled(options: dict[str, object], differential: Served) -> None:
    engine = Engine(differential.folder, enforce_eager=False, **options)
    try:
        for _ in range(2):
            assert engine.tokens(differential.prompts, NEW) == differential.tokens
    finally:
        engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sambay+da", "sambay-a", "sambay-mlp"])
def test_two_processes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads, channels and memory divided; keys copied in the first, as its pairs do not divide."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    fields = {"num_heads": 8, "num_kv_heads": 2} if name == "sambay+da" else {}
    model = served(name, tmp_path / "model", new=NEW, **fields)
    options = ALL_THREE if name == "sambay+da" else {"enable_prefix_caching": True}
    engine = Engine(model.folder, tensor_parallel_size=2, **options)
    try:
        for _ in range(2):
            assert engine.tokens(model.prompts, NEW) == model.tokens
    finally:
        engine.close()


@pytest.mark.slow
def test_bfloat16_is_as_near_as_a_plain_forward_in_bfloat16(differential: Served) -> None:
    """The same prompts, the first token's log-probabilities: neither is further from float32."""
    narrow = copy.deepcopy(differential.model).to(torch.bfloat16)
    engine = Engine(differential.folder, dtype="bfloat16", **ALL_THREE)
    try:
        outputs = engine.generate(differential.prompts, 1, logprobs=20)
    finally:
        engine.close()
    ours, plain = [], []
    with torch.inference_mode():
        for prompt, output, exact in zip(
            differential.prompts, outputs, differential.logits, strict=True
        ):
            own = torch.log_softmax(exact[0], -1)
            other = torch.log_softmax(narrow(torch.tensor([prompt]))[0, -1].float(), -1)
            for token, entry in output.outputs[0].logprobs[0].items():
                ours.append(abs(entry.logprob - float(own[token])))
                plain.append(abs(float(other[token] - own[token])))
    assert sum(ours) < 1.5 * sum(plain)
    assert max(ours) < 2.0 * max(plain)
