"""The zero-shot tasks with local data: no network, mistakes told before anything is asked."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest

pytest.importorskip("lm_eval")

import datasets

from sambay.errors import ConfigError, DataError, SambayError
from sambay.evals.harness import library
from sambay.evals.harness.evaluation import DOCUMENTS
from sambay.evals.suites.downstream import ACCURACIES, DownstreamSuite
from sambay.evals.tasks.downstream import TASKS
from tests.evals.harness_models import BreakingOff, engine_backend, read_lines

ROWS: dict[str, list[dict[str, Any]]] = {
    "wikitext": [{"page": " = The sky = \n one , two . "}, {"page": "the sun 's here"}],
    "lambada_openai": [{"text": "one two three four"}, {"text": "the sky is blue"}],
    "arc_challenge": [
        {
            "question": f"which is {word}?",
            "choices": {"text": ["the sky", word, "ten"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        }
        for word in ("one", "green", "yellow")
    ],
    "hellaswag": [
        {
            "activity_label": "Singing",
            "ctx_a": "The wren sits there.",
            "ctx_b": "she",
            "endings": ["sings.", "is the sky. [title] Again", "goes", "one two"],
            "label": label,
        }
        for label in ("0", "3")
    ],
    "piqa": [
        {"goal": "go there", "sol1": "go", "sol2": "sing one two", "label": n} for n in (0, 1)
    ],
    "winogrande": [
        {
            "sentence": "The wren sings to the sun because _ is yellow.",
            "option1": "the wren",
            "option2": "the sun",
            "answer": str(n),
        }
        for n in (1, 2)
    ],
}
ROWS["arc_easy"] = ROWS["arc_challenge"][:2]


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What was tried to be reached; nothing is."""
    tried: list[Any] = []

    def refuse(*arguments: Any, **options: Any) -> NoReturn:
        tried.append(arguments)
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tried


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Every layout that is offered: single files, and folders with shards of the split."""
    folder = tmp_path / "data"
    for name in ("lambada_openai", "arc_easy", "piqa"):
        write_lines(folder / f"{name}.jsonl", ROWS[name])
    datasets.Dataset.from_list(ROWS["arc_challenge"]).to_parquet(folder / "arc_challenge.parquet")
    hellaswag = datasets.Dataset.from_list(ROWS["hellaswag"])
    for shard in (0, 1):
        name = f"validation-0000{shard}-of-00002.parquet"
        (folder / "hellaswag/data").mkdir(parents=True, exist_ok=True)
        hellaswag.select([shard]).to_parquet(folder / "hellaswag/data" / name)
    write_lines(folder / "hellaswag/data/train.jsonl", [{"not": "read"}])
    write_lines(folder / "wikitext/test.jsonl", ROWS["wikitext"])
    write_lines(folder / "winogrande/winogrande_xl/validation.jsonl", ROWS["winogrande"])
    return folder


def test_all_tasks_from_local_files(data: Path, tmp_path: Path, network: list[Any]) -> None:
    backend = BreakingOff(engine_backend())
    result = DownstreamSuite(data=data).evaluate(backend, tmp_path / "out")
    assert network == []
    assert set(result.metrics) == {f"{n}.{task.metric}" for n, task in TASKS.items()} | {"average"}
    values = [result.metrics[f"{name}.{TASKS[name].metric}"] for name in ACCURACIES]
    assert len(values) == 6
    average = result.metrics["average"]
    assert average.value == pytest.approx(sum(one.value for one in values) / 6)
    assert average.stderr is not None
    assert average.count == 2 + 3 + 2 + 2 + 2 + 2
    lines = read_lines(tmp_path / "out" / DOCUMENTS)
    by_hand: dict[str, list[float]] = {}
    for line in lines:
        if line["task"] != "wikitext":
            by_hand.setdefault(line["task"], []).append(line[TASKS[line["task"]].metric])
    for name, right in by_hand.items():
        assert len(right) == len(ROWS[name])
        assert result.metrics[f"{name}.{TASKS[name].metric}"].value == sum(right) / len(right)
    assert 0 < average.value < 1
    wiki = result.details["tasks"]["wikitext"]
    assert wiki["documents"] == 2
    assert set(wiki["metrics"]) == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    # The published form of a task: words of lm-eval, not ours.
    prompt = backend.encode("Question: which is green?\nAnswer:")
    assert any(list(one.context) == prompt for one in backend.passages)
    assert backend.calls == []


def test_one_task_a_limit_and_no_average(data: Path, tmp_path: Path) -> None:
    suite = DownstreamSuite(tasks=("arc_challenge", "wikitext"), limit=2, data=data, bos=True)
    backend = BreakingOff(engine_backend())
    result = suite.evaluate(backend, tmp_path / "out")
    assert list(result.metrics) == ["wikitext.word_perplexity", "arc_challenge.acc_norm"]
    assert result.metrics["arc_challenge.acc_norm"].count == 2
    details = result.details["tasks"]["arc_challenge"]
    assert (details["documents"], details["documents_of_task"]) == (2, 3)
    assert all(one.context[0] == backend.prefix_id for one in backend.passages)
    assert str(data) not in json.dumps(result.settings)


def test_the_window_reaches_long_articles(tmp_path: Path) -> None:
    write_lines(tmp_path / "wikitext.jsonl", [{"page": "one two three four five six " * 9}])
    losses = set()
    for window in (8, 64):
        backend = BreakingOff(engine_backend(window + 1))
        suite = DownstreamSuite(tasks=("wikitext",), data=tmp_path, window=window)
        result = suite.evaluate(backend, tmp_path / str(window))
        assert max(len(one.continuation) for one in backend.passages) == window
        losses.add(result.metrics["wikitext.word_perplexity"].value)
    assert len(losses) == 2
    with pytest.raises(ConfigError, match="task wikitext, document 0 has 9 tokens"):
        DownstreamSuite(tasks=("wikitext",), data=tmp_path, window=8).evaluate(
            engine_backend(8), tmp_path / "small"
        )


def test_missing_and_damaged_data_are_told_before_anything_is_asked(
    data: Path, tmp_path: Path, network: list[Any]
) -> None:
    def mistake(name: str) -> str:
        backend = BreakingOff(engine_backend())
        with pytest.raises(SambayError) as caught:
            DownstreamSuite(tasks=("lambada_openai", name), data=data).evaluate(
                backend, tmp_path / "out"
            )
        assert backend.passages == []
        assert not (tmp_path / "out").exists()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    (data / "piqa.jsonl").unlink()
    assert f"task 'piqa': neither {data}/piqa.jsonl nor" in mistake("piqa")
    write_lines(data / "piqa.jsonl", [{"goal": "x", "sol1": "y", "label": 0}])
    assert "line 1 has no field 'sol2'; every row needs goal, sol1" in mistake("piqa")
    (data / "piqa.jsonl").write_text("")
    assert "piqa.jsonl, line 1 is not a JSON object" in mistake("piqa")
    (data / "arc_challenge.parquet").write_bytes(b"PAR1, not")
    assert "arc_challenge.parquet cannot be used (" in mistake("arc_challenge")
    datasets.Dataset.from_list([{"x": 1}]).to_parquet(data / "arc_challenge.parquet")
    assert "every row needs the fields question, choices, answerKey" in mistake("arc_challenge")
    write_lines(data / "hellaswag/validation.jsonl", ROWS["hellaswag"])
    assert "both .jsonl and .parquet" in mistake("hellaswag")
    assert network == []


def test_without_network_the_remedy_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreachable(*arguments: Any, **options: Any) -> NoReturn:
        raise ConnectionError("Couldn't reach 'x' on the Hub\nand more")

    monkeypatch.setattr(library.module("lm_eval.api.task").datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"task 'piqa'.*'baber/piqa'.*data=FOLDER") as caught:
        DownstreamSuite(tasks=("piqa",)).evaluate(engine_backend(), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": ()}, "tasks = .*; give at least one"),
        ({"tasks": ("arc_esy",)}, "'arc_esy' is not known.*arc_easy"),
        ({"tasks": ("piqa", "piqa")}, "holds a name twice"),
        ({"limit": 0}, "limit = 0"),
        ({"window": 1}, "window = 1"),
    ],
)
def test_settings_that_cannot_work(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DownstreamSuite(**fields)


def test_a_data_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        DownstreamSuite(data=tmp_path / "none").evaluate(engine_backend(), tmp_path / "out")
