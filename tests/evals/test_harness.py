"""lm-eval with our backend as the model: equal numbers, nothing cut, nothing asked twice."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import datasets
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from sambay.errors import ConfigError, DataError, MissingPackage
from sambay.evals.harness import library
from sambay.evals.harness.answers import Answers
from sambay.evals.harness.evaluation import DOCUMENTS, run_tasks
from sambay.evals.harness.library import TaskResult
from sambay.evals.harness.questions import Reading, to_call
from sambay.evals.result import RESULT
from sambay.evals.statistics import Metric
from tests.evals.harness_models import (
    BreakingOff,
    Stopped,
    engine_backend,
    fast_tokenizer,
    lm_eval_model,
    read_lines,
    tokenizer,
)

WINDOW = 48  # longer than every question: lm-eval would cut them
LONG = "The sky is blue. one two three four five six seven eight nine ten. " * 5


def make_tasks() -> dict[str, Any]:
    """Every kind of request: choices, last words, whole texts, continuations."""

    def task(name: str, kind: str, rows: list[dict[str, Any]], **fields: Any) -> Any:
        data = {"test": datasets.Dataset.from_list(rows)}
        common = {"task": name, "output_type": kind, "test_split": "test"}
        return library.make_task(common | {"custom_dataset": lambda **_: data} | fields)

    questions = [
        {"text": f"Question: {text}\nAnswer:", "choices": choices, "gold": gold}
        for text, choices, gold in (
            ("what is one and one?", ["two", "three of them", "yellow"], 0),
            ("which bird sings?", ["the sky", "the wren", "ten"], 1),
            ("who goes there?", ["back again", "we", "the rest of them all"], 2),
            ("what is one and one?", ["two", "green", "blue"], 0),
        )
    ]
    words = [{"text": "The sun is", "last": " yellow"}, {"text": "", "last": "Here we go"}]
    prompts = [{"text": "one two three", "last": " four"}, {"text": "Here we", "last": " go"}]
    return {
        "choices": task(
            "choices", "multiple_choice", questions,
            doc_to_text="text", doc_to_choice="choices", doc_to_target="gold",
            metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
        ),
        "words": task(
            "words", "loglikelihood", [*words, {"text": "one two ", "last": "three"}],
            doc_to_text="text", doc_to_target="last",
            metric_list=[{"metric": "perplexity"}, {"metric": "acc"}],
        ),
        "whole": task(
            "whole", "loglikelihood_rolling", [{"text": LONG}, {"text": "Here we go."}],
            doc_to_text="", doc_to_target="text",
            metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        ),
        "written": task(
            "written", "generate_until", prompts,
            doc_to_text="text", doc_to_target="last",
            generation_kwargs={"until": ["q", "\n"], "max_gen_toks": 9, "do_sample": False},
            metric_list=[{"metric": "exact_match"}],
        ),
    }  # fmt: skip


@pytest.fixture(scope="module")
def tasks() -> dict[str, Any]:
    return make_tasks()


def summarise(found: dict[str, TaskResult]) -> tuple[dict[str, Metric], dict[str, Any]]:
    metrics = {
        f"{task}.{name}": Metric(value, stderr, len(result.samples))
        for task, result in found.items()
        for name, (value, stderr) in result.metrics.items()
    }
    return metrics, {}


def run(tasks: dict[str, Any], backend: Any, out: Path, **options: Any) -> Any:
    return run_tasks("test", {}, tasks, backend, out, summarise, **({"window": WINDOW} | options))


@pytest.mark.parametrize("bos", [False, True])
def test_numbers_equal_those_of_lm_evals_own_model(bos: bool, tasks: dict[str, Any]) -> None:
    chosen = {name: task for name, task in tasks.items() if not (bos and name == "written")}
    answers = Answers(engine_backend(), window=WINDOW, bos=bos)
    ours = library.evaluate(chosen, answers)
    with library.quiet():
        others: Any = evaluate(
            lm=lm_eval_model(WINDOW, bos=bos), task_dict={"tasks": chosen}, bootstrap_iters=1000
        )
    assert others is not None
    scores = []
    for name, result in ours.items():
        theirs = {
            key.removesuffix(",none"): value
            for key, value in others["results"][name].items()
            if key.endswith(",none")
        }
        for metric, (value, stderr) in result.metrics.items():
            assert value == pytest.approx(theirs[metric], rel=1e-4)
            other = theirs[f"{metric}_stderr"]
            assert stderr == (None if other == "N/A" else pytest.approx(other, rel=1e-3))
        for ours_of, theirs_of in zip(result.samples, others["samples"][name], strict=True):
            assert ours_of["doc_hash"] == theirs_of["doc_hash"]
            for mine, other in zip(
                ours_of["filtered_resps"], theirs_of["filtered_resps"], strict=True
            ):
                if isinstance(mine, tuple):
                    assert mine[0] == pytest.approx(other[0], abs=1e-4)
                    assert mine[1] == other[1]
                    scores.append(mine[0])
                elif isinstance(mine, str):
                    assert mine == other
                    assert mine
                else:
                    assert mine == pytest.approx(other, abs=1e-4)
    assert len(set(scores)) > 8


@pytest.mark.parametrize("bos", [False, True])
def test_texts_are_encoded_as_lm_eval_encodes_them(bos: bool) -> None:
    model = lm_eval_model(WINDOW, bos=bos)
    eos = tokenizer().eos_id
    reading = Reading(tokenizer().encode, eos, bos, WINDOW)
    pairs = [
        ("The sky is", " blue"), ("The sky is ", "blue"), ("one\n", "two"), ("The gr", "een"),
        ("the wren \n ", " sings"), ("x", "yz" * 9),
    ]  # fmt: skip
    for context, continuation in pairs:
        passage = reading.pair(context, continuation, "here")
        theirs = model._encode_pair(context, continuation)
        assert (list(passage.context), list(passage.continuation)) == theirs
    empty = reading.pair("", "blue", "here")
    assert (empty.context, list(empty.continuation)) == ((eos,), tokenizer().encode("blue"))
    for text in ("", "one", LONG[:40], LONG):
        ids = fast_tokenizer(bos=bos).encode(text)
        windows = map(make_disjoint_window, get_rolling_token_windows(ids, eos, WINDOW, 1))
        assert [(list(x.context), list(x.continuation)) for x in reading.windows(text)] == [
            *windows
        ]
    with pytest.raises(DataError, match=r"here: the continuation '' has no token"):
        reading.pair("one", "", "here")
    begun = Reading(lambda text: [eos, 5], eos, False, WINDOW).pair("", "x", "here")
    assert (begun.context, begun.continuation) == ((eos,), (5,))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"until": "\n", "max_gen_toks": 3},
        {"until": ["a", ""], "max_new_tokens": 4, "temperature": 0.7},
        {"do_sample": False, "temperature": 0.7},
        {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.5},
    ],
)
def test_generation_options_mean_what_they_mean_to_lm_eval(options: dict[str, Any]) -> None:
    call = to_call("x", options, 3, "here")
    theirs: Any = normalize_gen_kwargs(options)
    assert call.max_new_tokens == theirs["max_gen_toks"]
    assert call.stop == tuple(text for text in theirs["until"] if text)
    assert call.sampling.greedy is not theirs["do_sample"]
    if theirs["do_sample"]:
        assert call.sampling.seed == 3
        for name in ("temperature", "top_k", "top_p"):
            assert name not in options or getattr(call.sampling, name) == options[name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "here: generation option 'num_beams' is not known"),
        ({"do_sample": True}, "here: do_sample needs a temperature"),
    ],
)
def test_generation_options_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_call("x", options, 0, "here")


def test_a_killed_evaluation_goes_on_and_writes_the_same_bytes(
    tasks: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = BreakingOff(engine_backend())
    result = run(tasks, whole, tmp_path / "whole")
    assert capfd.readouterr() == ("", "")
    asked = len(whole.passages) + len(whole.calls)
    reading = Reading(tokenizer().encode, tokenizer().eos_id, False, WINDOW)
    windows = len(reading.windows(LONG)) + 1
    assert windows > 3
    # Four questions of three choices, of which one occurs twice; three words; two prompts.
    assert (len(whole.passages), len(whole.calls)) == (11 + 3 + windows, 2)
    assert len(set(whole.passages)) == len(whole.passages)
    told: list[tuple[int, int, str]] = []
    backends = []
    for most in (3, 9, len(whole.passages) - 12):
        backends.append(BreakingOff(engine_backend(), most))
        with pytest.raises(Stopped):
            run(tasks, backends[-1], tmp_path / "parts")
        assert not (tmp_path / "parts" / RESULT).exists()
    last = BreakingOff(engine_backend())
    run(tasks, last, tmp_path / "parts", on_progress=lambda *seen: told.append(seen))
    assert told[0][:2] == (len(whole.passages), asked)
    assert told[-1][:2] == (asked, asked)
    assert "right" not in told[-1][2]
    assert last.passages == []
    assert len(last.calls) == 2
    for name in (RESULT, DOCUMENTS):
        parts, complete = ((tmp_path / x / name).read_bytes() for x in ("parts", "whole"))
        assert parts == complete
    keys = [one["key"] for one in read_lines(tmp_path / "parts" / "samples.jsonl")]
    assert len(set(keys)) == len(keys) == asked
    lines = read_lines(tmp_path / "whole" / DOCUMENTS)
    accuracies = [line["acc"] for line in lines if line["task"] == "choices"]
    assert result.metrics["choices.acc"].value == sum(accuracies) / 4
    again = BreakingOff(engine_backend(), 0)
    run(tasks, again, tmp_path / "whole")
    assert again.passages == again.calls == []


def test_limit_asks_the_first_documents(tasks: dict[str, Any], tmp_path: Path) -> None:
    backend = BreakingOff(engine_backend())
    result = run({"choices": tasks["choices"]}, backend, tmp_path / "two", limit=2)
    assert result.metrics["choices.acc"].count == 2
    assert len(backend.passages) == 6
    with pytest.raises(ConfigError, match="holds another evaluation: items_sha256"):
        run({"choices": tasks["choices"]}, backend, tmp_path / "two")


@pytest.mark.parametrize(
    ("name", "limit", "message"),
    [
        ("choices", 20, r"task choices, document \d has \d\d tokens.* context is 20"),
        ("whole", WINDOW, rf"task whole, document 0 has {WINDOW + 1} tokens.* smaller window"),
        ("written", 13, r"task written, document 0 has a prompt of 5 tokens and may take 9 more"),
    ],
)
def test_nothing_is_cut_and_nothing_is_asked(
    name: str, limit: int, message: str, tasks: dict[str, Any], tmp_path: Path
) -> None:
    backend = BreakingOff(engine_backend(limit))
    with pytest.raises(ConfigError, match=message):
        # What comes first fits: it must not be asked either.
        run({"words": tasks["words"], name: tasks[name]}, backend, tmp_path)
    assert backend.passages == backend.calls == []


def test_what_is_drawn_by_chance_is_drawn_each_time() -> None:
    backend = BreakingOff(engine_backend())
    answers = Answers(backend, window=WINDOW)
    drawn = {"do_sample": True, "temperature": 3.0, "max_gen_toks": 12}
    greedy = {"max_gen_toks": 12}
    asked = [("one two", drawn), ("one two", greedy)] * 2
    found = answers("generate_until", asked)
    assert len(backend.calls) == 3
    assert found[1] == found[3]
    assert len(set(found)) == 3
    assert answers("generate_until", asked) == found
    assert len(backend.calls) == 3


def test_the_model_serves_lm_eval_by_itself(tasks: dict[str, Any]) -> None:
    model = library.language_model(Answers(engine_backend(), window=WINDOW))
    with library.quiet():
        found: Any = evaluate(lm=model, task_dict={"tasks": {"choices": tasks["choices"]}})
    assert found is not None
    assert 0 <= found["results"]["choices"]["acc,none"] <= 1


def test_missing_lm_eval_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingPackage, match=r"lm_eval.*sambay\[eval\]"):
        library.module("lm_eval.tasks")
