"""Our engine and transformers as backends: against plain forwards, and against each other."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from sambay.errors import CheckpointMismatch, ConfigError, DataError
from sambay.evals.backends.engine import score_plainly
from sambay.evals.backends.identity import beside, model_name, resolve_model, weights_sha256
from sambay.evals.backends.scoring import plan_scores
from sambay.evals.calls import Answer, Backend, Call, Passage, Score
from sambay.generate.reference import reference_generate
from sambay.generate.sampling import SamplingParams
from sambay.hf.loading import load_model
from tests.evals.small_models import (
    chat_folder,
    engine_on,
    llama_folder,
    text_side,
    transformers_on,
)

DRAWN = SamplingParams(temperature=1.1, top_k=30, top_p=0.9, repetition_penalty=1.2, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("backends") / "tiny")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_folder(tmp_path_factory.mktemp("backends") / "llama")


@pytest.fixture(autouse=True)
def _plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("memory", "engine"):
        name = f"sambay.generate.{module}.available_bytes"
        monkeypatch.setattr(name, lambda device: 1 << 40)
    # Smaller calls than a processor likes: fewer rows are made up to fill them.
    monkeypatch.setattr("sambay.evals.backends.engine._TOKENS_PER_CALL", {"cpu": 160})
    monkeypatch.setattr("sambay.evals.backends.transformers._CHUNK", 160)


def answers(backend: Backend, calls: Sequence[Call]) -> list[Answer]:
    found: dict[int, Answer] = {}

    def keep(number: int, answer: Answer) -> None:
        assert number not in found
        found[number] = answer

    backend.generate(calls, keep)
    return [found[number] for number in range(len(calls))]


def scores(backend: Backend, passages: Sequence[Passage]) -> list[Score]:
    found: dict[int, Score] = {}

    def keep(number: int, score: Score) -> None:
        assert number not in found
        found[number] = score

    backend.score(passages, keep)
    return [found[number] for number in range(len(passages))]


def mixed_calls() -> list[Call]:
    return [
        Call("one", 6),
        Call("a longer prompt of some words", 9),
        Call("a longer prompt of some words", 4, chat=True),
        Call("Straße 猫", 12, sampling=DRAWN),
        Call("one", 5, sampling=dataclasses.replace(DRAWN, seed=6)),
        Call("one", 11, sampling=dataclasses.replace(DRAWN, repetition_penalty=1.0, top_k=0)),
    ]


def passages_of(count: int = 14) -> list[Passage]:
    """Lengths from 2 to 90, some alike, some that differ in the last token only."""
    drawn = torch.Generator().manual_seed(3)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, 261, (length,), generator=drawn).tolist())

    made = [Passage(ids(1), ids(1)), Passage(ids(89), ids(1)), Passage(ids(1), ids(89))]
    while len(made) < count - 3:
        made.append(Passage(ids(1 + 5 * len(made)), ids(1 + len(made) % 4)))
    context = ids(20)
    return made + [Passage(context, (9, last)) for last in (7, 8, 9)]


def test_plain_greedy_calls_are_those_of_a_forward_without_cache(folder: Path) -> None:
    backend = engine_on(folder)
    model = load_model(folder)
    for answer, call in zip(answers(backend, mixed_calls()[:2]), mixed_calls(), strict=False):
        prompt = backend.encode(call.prompt)
        ids, _ = reference_generate(model, prompt, call.max_new_tokens)
        ends = [number for number, token in enumerate(ids) if token in (0, 1)]
        length = ends[0] + 1 if ends else call.max_new_tokens
        tokens = [token for token in ids[:length] if token not in (0, 1)]
        text = text_side(folder).tokenizer.decode(tokens)
        assert answer == Answer(text, length, "stop" if ends else "length")


@pytest.mark.parametrize("batch_size", [None, 2])
def test_transformers_answers_what_the_engine_answers(folder: Path, batch_size: int | None) -> None:
    """Also calls that draw, each with its own settings and seed, in one list with others."""
    ours = answers(engine_on(folder, batch_size=batch_size), mixed_calls())
    theirs = answers(transformers_on(folder, batch_size=batch_size), mixed_calls())
    assert ours == theirs
    assert len({answer.text for answer in ours}) == len(ours)
    again = answers(engine_on(folder), mixed_calls()[::-1])[::-1]
    assert again == ours


@pytest.mark.parametrize("make", [engine_on, transformers_on])
def test_stop_strings_end_an_answer_and_do_not_belong_to_it(make: Any, folder: Path) -> None:
    whole = answers(make(folder), [Call("one", 12)])[0]
    stop = whole.text[2:4]
    place = whole.text.index(stop)
    calls = [Call("one", 12, (stop, "\0")), Call("one", 12), Call("one", 2, (stop,))]
    stopped, free, short = answers(make(folder), calls)
    assert stopped.text == whole.text[:place]
    assert stopped.finish_reason == "stop"
    assert stopped.num_tokens < whole.num_tokens
    assert free == whole
    assert (short.num_tokens, short.finish_reason) == (2, "length")
    with pytest.raises(ConfigError, match="stop string is empty"):
        make(folder).generate([Call("one", 3, ("",))], lambda number, answer: None)


@pytest.mark.parametrize("make", [engine_on, transformers_on])
def test_end_tokens_end_an_answer_and_the_last_step_is_the_limit(
    make: Any, folder: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    whole = answers(engine_on(folder), [Call("one", 8)])[0]
    token = engine_on(folder).encode(whole.text)[-1]
    (other / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [token], "repetition_penalty": 3.0, "do_sample": True})
    )
    ended = answers(make(other), [Call("one", 8), Call("one", 3)])
    assert ended[0].finish_reason == "stop"
    assert ended[0].text == whole.text[: whole.text.index(whole.text[-1])]
    assert ended[0].num_tokens == whole.text.index(whole.text[-1]) + 1


def test_a_chat_is_written_by_the_template(folder: Path) -> None:
    backend = engine_on(folder)
    plain, chat = Call("Hi <|end|>", 3), Call("Hi <|end|>", 3, chat=True)
    assert backend.prompt_length(plain) == 10  # bytes, never the control token
    assert backend.prompt_length(chat) == 10 + 3  # user, end, assistant


@pytest.mark.parametrize("make", [engine_on, transformers_on])
def test_scores_are_those_of_a_plain_forward(make: Any, folder: Path) -> None:
    backend, model = make(folder), load_model(folder)
    passages = passages_of()
    # What greedy decoding says must be found greedy.
    said, _ = reference_generate(model, [9, 8, 7], 4)
    passages.append(Passage((9, 8, 7), tuple(said)))
    for score, passage in zip(scores(backend, passages), passages, strict=True):
        plain = score_plainly(model, passage)
        assert score.logprob == pytest.approx(plain.logprob, abs=2e-4)
        assert score.is_greedy == plain.is_greedy
    assert score.is_greedy


@pytest.mark.parametrize("make", [engine_on, transformers_on])
def test_a_score_depends_on_no_other_passage(make: Any, folder: Path) -> None:
    """To the bit: what was scored before an interruption changes nothing."""
    # Few positions at once are what matrix products may well round differently.
    short = [Passage((9,), (8,)), Passage((7, 8), (9,)), Passage((5, 6, 7, 8), (9,))]
    passages = [*short, *passages_of()]
    all_scores = scores(make(folder), passages)
    for number in range(len(short)):
        assert scores(make(folder), [passages[number]]) == [all_scores[number]]
    for start in (3, 12):
        assert scores(make(folder), passages[start:]) == all_scores[start:]
    assert scores(make(folder), passages[::-1]) == all_scores[::-1]


@pytest.mark.parametrize("make", [engine_on, transformers_on])
def test_long_passages_are_scored_in_pieces(
    make: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scores(make(folder), passages_of())
    monkeypatch.setattr("sambay.evals.backends.scoring.POSITIONS", 5)
    monkeypatch.setattr("sambay.evals.backends.transformers._CHUNK", 16)
    monkeypatch.setattr("sambay.evals.backends.engine._TOKENS_PER_CALL", {"cpu": 32})
    backend = make(folder)
    widest = []
    if make is engine_on:
        backend._engine.prefill_chunk = 16
        head = backend._engine.model.logits
        monkeypatch.setattr(
            backend._engine.model, "logits", lambda h: (widest.append(h.shape[1]), head(h))[1]
        )
    pieces = scores(backend, passages_of())
    assert [one.is_greedy for one in pieces] == [one.is_greedy for one in whole]
    torch.testing.assert_close(
        [one.logprob for one in pieces], [one.logprob for one in whole], atol=2e-4, rtol=0
    )
    assert set(widest) == ({5} if make is engine_on else set())


def test_passages_that_share_all_but_the_last_token_share_a_row() -> None:
    passages = passages_of()
    settings: dict[str, Any] = {"vocab_size": 261, "max_context": None}
    batches = plan_scores(passages, tokens_per_call=256, **settings)
    rows = [row for batch in batches for row in batch.rows]
    assert len(rows) == len(passages) - 2
    assert sorted(user for row in rows for user, _ in row.users) == list(range(len(passages)))
    assert all(batch.num_rows * batch.width <= 256 for batch in batches)
    assert all(len(row.ids) <= batch.width for batch in batches for row in batch.rows)
    assert all(batch.first <= len(row.ids) - row.count for batch in batches for row in batch.rows)
    widths = [batch.width for batch in batches]
    assert widths == sorted(widths, reverse=True)
    assert plan_scores([], tokens_per_call=8, **settings) == []


@pytest.mark.parametrize("make", [engine_on, transformers_on])
@pytest.mark.parametrize(
    ("passage", "message"),
    [
        (Passage((), (7,)), "passage 1 has no context"),
        (Passage((7,), ()), "passage 1 has no continuation"),
        (Passage((7,), (261,)), "outside the model's vocabulary of 261"),
        (Passage((7,) * 40, (8,)), "41 tokens, the model's context is 40"),
    ],
)
def test_passages_that_cannot_be_scored_are_refused_before_the_others(
    make: Any, passage: Passage, message: str, folder: Path
) -> None:
    told: list[int] = []
    with pytest.raises(ConfigError, match=message):
        make(folder, max_context=40).score(
            [Passage((7,), (8,)), passage], lambda number, score: told.append(number)
        )
    assert told == []


def test_another_model_of_transformers_answers_like_its_own_generate(llama: Path) -> None:
    """Rows padded on the left, against the plain call with one row; scores, against logits."""
    from transformers import AutoModelForCausalLM

    backend = transformers_on(llama)
    model = AutoModelForCausalLM.from_pretrained(llama)
    calls = [Call("one", 6), Call("a longer prompt of some words", 9), Call("two?", 3)]
    for call, answer in zip(calls, answers(backend, calls), strict=True):
        ids = torch.tensor([backend.encode(call.prompt)])
        out = model.generate(ids, max_new_tokens=call.max_new_tokens, do_sample=False)[0]
        produced = out[ids.shape[1] :].tolist()
        assert answer.num_tokens == len(produced)
        kept = [token for token in produced if token not in (0, 1)]
        assert answer.text == text_side(llama).tokenizer.decode(kept)
    passages = passages_of()
    for passage, score in zip(passages, scores(backend, passages), strict=True):
        ids = [*passage.context, *passage.continuation]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        places = range(len(passage.context) - 1, len(ids) - 1)
        wanted = sum(float(logprobs[place, ids[place + 1]]) for place in places)
        assert score.logprob == pytest.approx(wanted, abs=2e-4)


def test_facts_are_the_same_for_the_same_files_and_tell_others_apart(
    folder: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(folder, tmp_path / folder.name)
    facts = engine_on(folder).facts
    assert facts == engine_on(copied).facts
    assert json.loads(json.dumps(facts)) == facts
    assert facts["name"] == "tiny"
    assert facts["dtype"] == "float32"
    config = load_model(folder).config
    assert (facts["layer_pattern"], facts["window"]) == (config.layer_pattern, config.window)
    assert facts["parameters"] == sum(p.numel() for p in load_model(folder).parameters())
    config = copied / "config.json"
    config.write_text(config.read_text().replace("{", "{ ", 1))
    assert engine_on(copied).facts["weights_sha256"] != facts["weights_sha256"]
    with (copied / "chat_template.jinja").open("a") as file:
        file.write("{# other #}")
    assert engine_on(copied).facts["chat_template_sha256"] != facts["chat_template_sha256"]


def test_a_run_directory_means_its_newest_checkpoint_else_its_model(
    folder: Path, tmp_path: Path
) -> None:
    """Found once: a run that goes on writes newer ones, and the fingerprint is of what is read."""
    run_dir = tmp_path / "run"
    shutil.copytree(folder, run_dir / "model")
    assert resolve_model(run_dir) == run_dir / "model"
    assert resolve_model(folder) == beside(folder) == folder
    for step in (2, 10):
        checkpoint = run_dir / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text(json.dumps({"step": step, "files": {}}))
        assert resolve_model(run_dir) == resolve_model(checkpoint) == checkpoint
        assert beside(checkpoint) == run_dir
    hashes = {weights_sha256(path) for path in (run_dir / "checkpoints").iterdir()}
    assert len(hashes) == 2
    assert model_name(run_dir) == model_name(run_dir / "x" / "..") == "run"
    with pytest.raises(CheckpointMismatch, match="does not exist; give a model folder"):
        resolve_model(tmp_path / "none")


def test_what_the_files_say_limits_the_context(folder: Path, llama: Path, tmp_path: Path) -> None:
    assert engine_on(folder).max_context == 1 << 20  # as transformers' configuration says
    without = shutil.copytree(folder, tmp_path / "without")
    values = json.loads((folder / "config.json").read_text())
    del values["max_position_embeddings"]
    (without / "config.json").write_text(json.dumps(values))
    assert engine_on(without).max_context is None
    assert engine_on(folder, max_context=9).max_context == 9
    assert transformers_on(llama).max_context == 512
    assert transformers_on(llama, max_context=1024).max_context == 1024


def test_mistakes_are_said_before_anything_is_computed(
    folder: Path, llama: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "chat_template.jinja").unlink()
    told: list[int] = []
    with pytest.raises(ConfigError, match="has no chat template"):
        engine_on(other).generate(
            [Call("x", 2), Call("x", 2, chat=True)], lambda number, answer: told.append(number)
        )
    with pytest.raises(ConfigError, match="empty prompt"):
        engine_on(folder).generate([Call("x", 2), Call("", 2)], lambda n, answer: told.append(n))
    assert told == []
    with pytest.raises(ConfigError, match=r"none\.jinja"):
        text_side(folder, str(tmp_path / "none.jinja"))
    smaller = shutil.copytree(llama, tmp_path / "smaller")
    definition = json.loads((smaller / "tokenizer.json").read_text())
    definition["model"]["vocab"]["zz"] = 261
    (smaller / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(ConfigError, match=r"the tokenizer has 262 tokens, .* is 261"):
        transformers_on(smaller)
    with pytest.raises(CheckpointMismatch, match=r"has no config\.json of a model"):
        transformers_on(tmp_path)
    (smaller / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"has no tokenizer\.json"):
        transformers_on(smaller)
    broken = shutil.copytree(llama, tmp_path / "broken")
    (broken / "config.json").write_text('{"model_type": "unheard of"}')
    with pytest.raises(CheckpointMismatch, match="transformers cannot load"):
        transformers_on(broken)
