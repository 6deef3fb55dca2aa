"""`sambay evaluate`: options, mistakes, interruptions, what it prints and writes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from sambay.cli.evaluate import build_suite
from sambay.cli.main import main
from sambay.errors import ConfigError
from sambay.evals.catalogue import SUITES, is_required, open_suite, options_of
from sambay.evals.result import read_result
from tests.evals.small_models import chat_folder, llama_folder

SUITE = '''
from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from sambay.evals.calls import Call
from sambay.evals.runner import Item, run_suite
from sambay.evals.statistics import mean


@dataclass(frozen=True)
class Greetings:
    """Greets so many times."""

    count: int = 3
    words: tuple[str, ...] = ("hello", "good day")
    shares: tuple[float, ...] = (0.5,)
    file: Path | None = None
    limit: int | None = None
    chat: bool = False
    new: int = 4
    rate: float = 0.0
    draws: bool = False

    name = "greetings"

    @property
    def settings(self):
        return {name: str(value) for name, value in asdict(self).items()}

    def items(self):
        made = [f"{word} {number}" for number in range(self.count) for word in self.words]
        return [Item(text, Call(text, self.new, chat=self.chat)) for text in made]

    def judge(self, item, answer):
        time.sleep(float(os.environ.get("SECONDS_PER_ANSWER", "0")))
        return {"correct": answer.num_tokens > 3}

    def summarise(self, items, records):
        return {"long": mean([float(records[item.key]["correct"]) for item in items])}, {}

    def evaluate(self, backend, out, *, on_progress=None):
        return run_suite(self, backend, out, on_progress=on_progress)

    def pictures(self, result):
        if not self.draws:
            return {}
        from sambay.plots.canvas import new_figure
        return {"long": new_figure(2, 1)}


@dataclass
class Scores:
    """Scores one passage."""

    name = "scores"

    def evaluate(self, backend, out, *, on_progress=None):
        from sambay.evals.calls import Passage
        from sambay.evals.result import Result
        found = {}
        passages = [Passage((backend.prefix_id, 5), tuple(backend.encode("abc")))]
        backend.score(passages, found.__setitem__)
        result = Result(
            "scores", {}, "", backend.facts, {"nats": mean([-found[0].logprob])}, {}
        )
        result.write(out)
        return result


@dataclass
class Reads:
    file: str

    def evaluate(self, backend, out, *, on_progress=None):
        raise AssertionError


class Nothing:
    pass
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("evaluate") / "tiny")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of its own, with the suite."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    Path("my.py").write_text(SUITE, encoding="utf-8")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["evaluate", *map(str, arguments)])
    streams = capsys.readouterr()
    return code, streams.out, streams.err


def test_an_evaluation_prints_its_metrics_and_where_they_are(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, folder, "my.py:Greetings", "count=5", "draws=yes")
    assert code == 0
    place = Path("results/tiny-Greetings")
    assert out.splitlines()[0].startswith("long  ")
    assert out.splitlines()[0].endswith("(n = 10)")
    names = [str(place / name) for name in ("result.json", "long.png", "long.svg")]
    assert out.splitlines()[1] == f"written to {', '.join(names)}"
    assert all(Path(name).stat().st_size > 100 for name in names)
    result = read_result(place)
    assert result.settings["count"] == "5"
    assert result.model["backend"] == "engine"
    assert result.model["name"] == "tiny"
    before = Path(names[0]).read_bytes()
    assert run(capsys, folder, "my.py:Greetings", "draws=yes", "count=5")[0] == 0
    assert Path(names[0]).read_bytes() == before
    code, _, err = run(capsys, folder, "my.py:Greetings", "count=4")
    assert code == 2
    assert "results/tiny-Greetings holds another evaluation: settings.count was '5', now '4'" in err


def test_quantised_weights_are_another_model(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    words = (folder, "my.py:Scores", "--threads", 1)
    assert run(capsys, *words)[0] == 0
    code, _, err = run(capsys, *words, "--weights", "int8", "--out", "results/int8")
    assert code == 0, err
    exact, rounded = read_result(Path("results/tiny-Scores")), read_result(Path("results/int8"))
    assert "weights" not in exact.model
    assert rounded.model == exact.model | {"weights": "int8"}
    assert rounded.metrics["nats"].value != exact.metrics["nats"].value
    assert rounded.metrics["nats"].value == pytest.approx(exact.metrics["nats"].value, abs=0.05)


def test_backends_agree(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for backend in ("engine", "transformers"):
        for suite in ("Greetings", "Scores"):
            words = (folder, f"my.py:{suite}", "--backend", backend, "--out", f"{backend}-{suite}")
            assert run(capsys, *words, "--threads", 1, "--device", "cpu")[0] == 0
    ours, theirs = (
        Path(f"{backend}-Greetings/samples.jsonl").read_text().splitlines()
        for backend in ("engine", "transformers")
    )
    assert sorted(ours) == sorted(theirs)
    nats = [
        read_result(Path(f"{backend}-Scores")).metrics["nats"].value
        for backend in ("engine", "transformers")
    ]
    assert nats[0] == pytest.approx(nats[1], abs=1e-4)


def test_options_are_typed_by_the_fields_of_the_suite() -> None:
    words = [
        "count=7", "words=a, b c", "shares=1,0.25", "file=~/x", "limit=None", "chat=true",
        "rate=1e-3",
    ]  # fmt: skip
    name, suite = build_suite("my.py:Greetings", words)
    assert name == "Greetings"
    values = vars(suite)
    assert values["words"] == ("a", "b c")
    assert values["shares"] == (1.0, 0.25)
    assert values["file"] == Path("~/x").expanduser()
    assert (values["count"], values["limit"], values["chat"]) == (7, None, True)
    assert vars(build_suite("my.py:Greetings", ["words=", "limit=2"])[1])["words"] == ()
    for words, message in (
        (["cuont=2"], r"suite 'Greetings' has no option 'cuont' \(did you mean 'count'\?\)"),
        (["count=x"], "count = 'x'; it must be a whole number"),
        (["shares=1,x"], "shares = 'x'; it must be a number"),
        (["limit=x"], "limit = 'x'; it must be a whole number or None"),
        (["count=1", "count=2"], "count is given twice"),
        (["count"], "'count' is no option of the suite; write name=value"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_suite("my.py:Greetings", words)


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_has_options_that_the_command_line_can_give(name: str) -> None:
    """The words of their defaults give them again."""
    _, suite = open_suite(name)
    needed = [f"{field.name}=1" for field in fields(suite) if is_required(field)]
    if needed:
        with pytest.raises(ConfigError, match=f"suite '{name}' needs {needed[0][:-1]}VALUE"):
            build_suite(name, needed[1:])
    made = build_suite(name, needed)[1]
    assert callable(made.evaluate)
    words = []
    for option in options_of(suite):
        value = getattr(made, option)
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words.append(f"{option}={text}")
    assert build_suite(name, words)[1] == made


def test_a_rehearsal_says_what_would_be_asked_and_loads_no_weights(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = shutil.copytree(folder, tmp_path / "bare")
    for file in bare.glob("*.safetensors"):
        file.unlink()
    code, out, _ = run(capsys, bare, "my.py:Greetings", "count=12", "--dry-run")
    assert code == 0
    assert "count = 12\n" in out
    assert "questions: 24 to answer\n" in out
    assert "longest prompt: 11 tokens, 15 with its answer (context: 1,048,576)\n" in out
    words = ("my.py:Greetings", "chat=1", "--dry-run", "--max-context", 20)
    assert "13 tokens, 17 with its answer (context: 20)" in run(capsys, bare, *words)[1]
    code, out, _ = run(capsys, bare, "my.py:Scores", "--dry-run")
    assert "questions: 1 to score\nlongest prompt: 2 tokens, 5 with its answer" in out
    assert not Path("results").exists()


def test_another_model_of_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama = llama_folder(tmp_path / "llama")
    code, out, _ = run(capsys, llama, "my.py:Greetings", "--backend", "transformers")
    assert code == 0
    assert "written to results/llama-Greetings/result.json" in out
    code, _, err = run(capsys, llama, "my.py:Greetings")
    assert code == 2
    assert err.count("\n") == 1
    assert "model_type" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{model}", "give a model and a suite: sambay evaluate MODEL SUITE"),
        ("{model} phonbook", "unknown suite 'phonbook' (did you mean 'phonebook'?)"),
        ("{model} my.py", "suite 'my.py' names no class; write my.py:CLASS"),
        ("{model} my.py:Greting", "my.py has no class 'Greting' (did you mean 'Greetings'?)"),
        ("{model} my.py:Nothing", "my.py:Nothing is no suite"),
        ("{model} my.py:Reads", "suite 'Reads' needs file=VALUE; write it behind the suite"),
        ("{model} your.py:Some", "suite file your.py does not exist"),
        ("{model} bad.py:Some", "suite file bad.py cannot be imported"),
        ("none my.py:Greetings", "model none does not exist; give a model folder"),
        ("{tmp} my.py:Greetings", "holds no model"),
        ("{model} my.py:Greetings count=0", "suite 'greetings' has no questions"),
        ("{model} my.py:Greetings --max-context 10",
         "question hello 0 has 7 tokens and may take 4 more, the model's context is 10"),
        ("{model} my.py:Greetings --url http://127.0.0.1:1", "--url is for --backend server"),
        ("{model} my.py:Greetings --backend server", "--backend server needs --url"),
        ("m my.py:Greetings --backend server --url http://127.0.0.1:1 --dtype float32",
         "--dtype is for models that run here"),
        ("m my.py:Greetings --backend server --url http://127.0.0.1:1 --device cpu",
         "--device is for models that run here"),
        ("{model} my.py:Greetings --backend transformers --weights int8",
         "--weights is for --backend engine; transformers has its own"),
        ("m my.py:Greetings --backend server --url nowhere", "is not the address of a server"),
        ("{model} my.py:Greetings --batch-size 0", "--batch-size is 0; it must be at least 1"),
        ("{model} my.py:Greetings --tokenizer none", "--tokenizer none: there is no none"),
        ("{plain} my.py:Greetings chat=1", "has no chat template"),
        ("{small} my.py:Greetings", "use the tokenizer that belongs to the model"),
        ("{model} my.py:Greetings --template none.jinja", "chat template none.jinja cannot be"),
        ("{model} --table a", "--table takes finished results"),
        ("--table a", "a does not exist; give the result.json of a finished evaluation"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_before_anything_is_asked(
    words: str, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.py").write_text("import nothing_of_the_kind")
    plain = shutil.copytree(folder, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    small = shutil.copytree(folder, tmp_path / "small")
    definition = json.loads((small / "tokenizer.json").read_text())
    definition["model"]["vocab"]["zz"] = 261
    (small / "tokenizer.json").write_text(json.dumps(definition))
    given = words.format(model=folder, tmp=tmp_path, plain=plain, small=small).split()
    code, out, err = run(capsys, *given)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.rglob("*.jsonl")) or not any(
        file.read_bytes() for file in tmp_path.rglob("*.jsonl")
    )


def test_a_table_of_finished_results(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sambay.evals.table")
    for count in (1, 2):
        words = (folder, "my.py:Greetings", f"count={count}", "--out", f"out{count}")
        assert run(capsys, *words)[0] == 0
    code, shown, _ = run(capsys, "--table", "out1", "out2/result.json")
    assert code == 0
    assert "long" in shown
    assert "|" in shown
    assert run(capsys, "--table", "out1", "out2", "--out", "both.md")[1] == "written to both.md\n"
    assert Path("both.md").read_text() == shown


def test_phone_books_of_several_models_are_drawn_beside_their_table(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The length extrapolation, and the sweep of windows of models that differ in them."""
    pytest.importorskip("matplotlib")
    asked = ("phonebook", "pairs=3,6", "groups=2", "batches=1", "prompts=1", "max_new_tokens=2")
    assert run(capsys, folder, *asked, "--out", "one")[0] == 0
    other = json.loads(Path("one/result.json").read_text())
    other["model"] |= {"window": other["model"]["window"] * 2, "name": "another"}
    Path("two.json").write_text(json.dumps(other))
    told = run(capsys, "--table", "one", "two.json", "--out", "all.md")[1]
    drawn = [f"all_{kind}.{suffix}" for kind in ("lengths", "windows") for suffix in ("png", "svg")]
    assert told == f"written to all.md, {', '.join(drawn)}\n"
    assert all(Path(name).stat().st_size > 1000 for name in drawn)


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(folder), "my.py:Greetings", "count=20", "--batch-size", "2", "--out"]
    child = os.fork()
    if child == 0:  # what a new process would do, without its imports
        code = 1
        try:
            os.environ["SECONDS_PER_ANSWER"] = "0.2"
            sys.stderr = (tmp_path / "err").open("w")
            code = main(["evaluate", *words, "cut"])
            sys.stderr.flush()
        finally:
            os._exit(code)
    samples = tmp_path / "cut" / "samples.jsonl"
    deadline = time.monotonic() + 100
    while not (samples.exists() and samples.stat().st_size):
        assert time.monotonic() < deadline
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.02)
    os.kill(child, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert (tmp_path / "err").read_text().splitlines()[-1] == (
        "interrupted; what is answered is kept in cut, run the same command again to go on"
    )
    kept = samples.read_bytes().count(b"\n")
    assert 0 < kept < 40
    assert run(capsys, *words, "cut")[0] == 0
    assert run(capsys, *words, "whole")[0] == 0
    cut, whole = (read_result(tmp_path / name) for name in ("cut", "whole"))
    assert (cut.metrics, cut.details, cut.model) == (whole.metrics, whole.details, whole.model)
    texts = [
        sorted((tmp_path / name / "samples.jsonl").read_text().splitlines())
        for name in ("cut", "whole")
    ]
    assert texts[0] == texts[1]
