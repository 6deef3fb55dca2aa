"""The retrieval study: its data, its plan, asking finished models, and the page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")

from sambay.cli.main import main
from sambay.data.shards import TokenDataset
from sambay.data.tokenizer import Tokenizer
from sambay.errors import ConfigError
from sambay.evals.result import Result
from sambay.model import LanguageModel
from sambay.model.folder import save_model_folder
from sambay.recipes.small_retrieval import LENGTH, MIXTURES, ROWS, VOCABULARY, small_model
from sambay.spec.footprint import parameter_count
from sambay.studies import retrieval
from sambay.studies.retrieval_corpus import CorpusSettings, write_corpus
from sambay.studies.retrieval_report import page, write

SETTINGS = CorpusSettings(VOCABULARY, documents=40, validation_fraction=0.3)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("some text")
    for number in range(300):
        lines = [f"value_{number} = {number * line}  # a line of text" for line in range(12)]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, replace(SETTINGS, text=text))
    return folder


def test_the_sets_share_a_tokenizer_that_joins_two_digits_at_most(data: Path, text: Path) -> None:
    sets = [TokenDataset.open(data / name, "train") for name in set().union(*MIXTURES.values())]
    assert len({one.manifest.tokenizer_sha256 for one in sets}) == 1
    tokenizer = Tokenizer.load(data / "tokenizer")
    parts = [tokenizer.decode([token]) for token in tokenizer.encode("John: 9876501234\n")]
    digits = [part.strip() for part in parts if part.strip().isdigit()]
    assert "".join(digits) == "9876501234"
    assert max(map(len, digits)) == 2
    said: list[str] = []
    write_corpus(data, replace(SETTINGS, text=text), tell=said.append)
    assert not [line for line in said if "writing" in line or "training" in line]


def _documents(data: Path, kind: str) -> list[str]:
    lines = (data / "sources" / f"{kind}.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def test_books_fit_a_row_and_small_ones_are_as_many_as_large_ones(data: Path) -> None:
    tokenizer = Tokenizer.load(data / "tokenizer")
    books = _documents(data, "books")
    sizes = [len(book.split("\n\n")[0].splitlines()) for book in books]
    assert len(books) == 40
    assert min(sizes) == 3
    assert max(sizes) <= 22
    assert sum(size <= 8 for size in sizes) > len(sizes) / 4
    assert max(len(tokenizer.encode(book)) for book in books) < 1.5 * LENGTH  # full vocabulary: 1.0
    short = [len(book.split("\n\n")[0].splitlines()) for book in _documents(data, "short_books")]
    assert set(short) == {3, 4, 5, 6}
    name, number = books[0].splitlines()[0].split(": ")
    assert len(name.split()) == 2
    assert len(number) == 6


def test_every_needle_has_its_answer_in_the_text(data: Path) -> None:
    for text in _documents(data, "needles"):
        body, question = text.rstrip("\n").rsplit("\n", 1)
        key = question.split("number for ")[1].split(" mentioned")[0]
        value = question.rsplit(" is ", 1)[1]
        assert body.count(f"numbers for {key} is: {value}") == 1
        assert body.count("One of the special") in (1, 2, 3, 4)


def test_repeated_numbers_are_written_again_and_again(data: Path) -> None:
    for text in _documents(data, "repeats"):
        first, *others = text.splitlines()
        assert others
        assert set(others) == {first}
        pieces = [first[place : place + 2] for place in range(0, len(first), 2)]
        assert 8 <= len(pieces) == len(set(pieces)) <= 40


def test_other_settings_for_the_same_folder_are_refused(data: Path) -> None:
    with pytest.raises(ConfigError, match="not a folder"):
        write_corpus(data, replace(SETTINGS, text=data / "nowhere"))


def test_contenders_have_equal_parameters_and_see_the_same_data() -> None:
    runs = retrieval.members(retrieval.Scale(), [1, 2], Path("data"))
    assert len({run.name for run in runs}) == len(runs) == 2 * len(retrieval.CONTENDERS)
    counts = [parameter_count(run.config.model) for run in runs]
    assert max(counts) / min(counts) < 1.01
    mixtures = {run.architecture: run.config.data for run in runs}
    assert len({mixtures[name] for name in mixtures if not name.endswith("-chains")}) == 1
    assert mixtures["sambay-chains"] == mixtures["transformer++-chains"] != mixtures["sambay"]
    tokens = {run.architecture: run.config.schedule.total_tokens for run in runs}
    once = tokens["sambay"]
    assert {name for name, count in tokens.items() if count == 2 * once} == {
        "sambay-chains", "transformer++-chains",
    }  # fmt: skip
    assert set(tokens.values()) == {once, 2 * once}
    assert {run.config.data.sequence_length for run in runs} == {LENGTH}
    windows = {run.architecture: run.config.model.window for run in runs}
    assert windows["sambay-w16"] == 16
    assert windows["sambay-w64"] == 64
    assert windows["sambay"] == windows["samba+yoco"] == 32
    assert windows["transformer++"] is None


def test_finished_runs_are_asked_and_others_left_out(data: Path, tmp_path: Path) -> None:
    scale = retrieval.Scale(
        contenders=retrieval.chosen_contenders(["sambay", "transformer++", "sambay-w16"]),
        pairs=(3, 4), steps=(1, 2), puzzles=2,
    )  # fmt: skip
    runs = retrieval.members(scale, [1], tmp_path / "data")
    tokenizer = data / "tokenizer" / "tokenizer.json"
    for run, label in zip(runs, ("sambay", "transformer++"), strict=False):
        folder = tmp_path / "runs" / run.name / "model"
        save_model_folder(folder, LanguageModel(small_model(label)), tokenizer)
    suites = {name: suite for name, suite in scale.suites().items() if name != "needles"}
    suites["phonebook"] = replace(suites["phonebook"], groups=2, batches=1, prompts=2)
    found: dict[str, dict[str, Result]] = retrieval.ask_all(runs, scale, tmp_path, suites=suites)
    assert list(found) == ["sambay-d8-s1", "transformer++-d8-s1"]
    again = retrieval.ask_all(runs, scale, tmp_path, suites=suites)
    assert again == found
    rows = {
        run.name: {
            "architecture": run.architecture, "seed": 1, "parameters": 9, "tokens": 8,
            "validation_loss": 2.5,
        }
        for run in runs
    }  # fmt: skip
    text = page(found, rows)
    assert "| sambay-d8-s1 | 32 | 9 | 8 | 2.5000 |" in text
    assert "| transformer++-d8-s1 | – | 9" in text
    assert text.count("accuracy@3") == 1
    pytest.importorskip("matplotlib")
    written = {path.name for path in write(found, rows, tmp_path)}
    assert {"study.md", "study.json", "phonebook_length.png", "chains.svg"} <= written
    numbers = json.loads((tmp_path / "study.json").read_text())["runs"]["sambay-d8-s1"]
    assert numbers["results"]["chains"]["metrics"]["accuracy@1"]["count"] == 2


def test_the_plan_is_shown_and_mistakes_are_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["study", "retrieval", "--out", str(tmp_path / "out")]
    assert main([*command, "--smaller", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()] == [
        "transformer++-d8-s1", "transformer-ls-d8-s1", "samba+yoco-d8-s1", "sambay-d8-s1",
    ]  # fmt: skip
    for words, message in (
        (["--contenders", "samby"], "did you mean 'sambay'"),
        (["--contenders", "sambay,sambay"], "given twice"),
        (["--contenders", ","], "names nothing"),
        (["--tokens", "0"], "--tokens = 0"),
        (["--seeds", "one"], "--seeds"),
        (["--text", str(tmp_path / "nowhere")], "not a folder"),
    ):
        assert main([*command, *words]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_whole_of_it_in_small(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path
) -> None:
    """Train, ask, report; again: nothing is trained or asked a second time."""
    tiny = retrieval.Scale(
        tokens=4 * ROWS * LENGTH, contenders=retrieval.chosen_contenders(["sambay"]),
        documents=300,
        pairs=(3,), lengths=(2048,), needles=1, steps=(1,), puzzles=2,
    )  # fmt: skip
    monkeypatch.setattr(retrieval, "SMALLER", tiny)
    command = ["study", "retrieval", "--smaller", "--text", str(text), "--out", str(tmp_path)]
    assert main(command) == 0
    first = (tmp_path / "study.json").read_bytes()
    assert "sambay-d8-s1 finished" in capsys.readouterr().err
    assert main(command) == 0
    assert "starts" not in capsys.readouterr().err
    assert (tmp_path / "study.json").read_bytes() == first
