"""The fine-tuning scripts, end to end on a tiny model, and what they say about bad data."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers", reason="the classes of transformers are not installed")
for package in ("datasets", "peft", "trl"):
    pytest.importorskip(package, reason=f"{package} is not installed")

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from sambay.hf.loading import load_model  # noqa: E402
from tests.hf.tiny_chat import chat_folder  # noqa: E402
from tests.hf.tiny_hf import OFFICIAL  # noqa: E402

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "finetune"
DOCUMENT = (ROOT / "docs" / "fine-tuning.md").read_text(encoding="utf-8")
CONVERSATIONS = [
    {
        "messages": [
            {"role": "user", "content": f"{a}+{b}?"},
            {"role": "assistant", "content": str(a + b) * (a + 1)},
        ]
    }
    for a in range(3)
    for b in range(3)
]
PAIRS = [
    {
        "prompt": row["messages"][0]["content"],
        "chosen": row["messages"][1]["content"],
        "rejected": "no",
    }
    for row in CONVERSATIONS
]
SMALL = ("--max-length", "64", "--accumulate", "2", "--max-steps", "3", "--learning-rate", "1e-2")

Stage = Callable[..., None]


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """Calls a script as its command line would, but inside this process."""
    sys.path.insert(0, str(SCRIPTS))

    def call(name: str, *words: str | Path) -> None:
        script = importlib.import_module(name)
        args = script.options().parse_args([str(word) for word in words])
        importlib.import_module("stage").run(getattr(script, name), args)

    yield call
    sys.path.remove(str(SCRIPTS))
    for name in ("stage", "rollouts", "midtrain", "sft", "dpo"):
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(file: Path, rows: list[Any]) -> Path:
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("layout", "ways"),
    [
        ("sambay+da", ("--full", "--lora", "--lora")),
        pytest.param(OFFICIAL, ("--lora", "--full", "--full"), marks=pytest.mark.slow),
    ],
)
def test_three_stages(stage: Stage, layout: str, ways: tuple[str, ...], tmp_path: Path) -> None:
    """Mid-training, SFT and DPO follow each other, and everything can read the result."""
    model = chat_folder(tmp_path / "base", layout)
    chats = write(tmp_path / "chats.jsonl", CONVERSATIONS)
    pairs = write(tmp_path / "pairs.jsonl", PAIRS)
    config = json.loads((model / "config.json").read_text())
    for name, data, way in zip(
        ("midtrain", "sft", "dpo"), (chats, chats, pairs), ways, strict=True
    ):
        out = tmp_path / name
        stage(name, "--model", model, "--data", data, "--out", out, way, *SMALL)
        before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
        assert {k: (v.shape, v.dtype) for k, v in after.items()} == {
            k: (v.shape, v.dtype) for k, v in before.items()
        }
        changed = {k for k in after if not torch.equal(after[k], before[k])}
        assert changed, "something was learned"
        if way == "--lora":
            assert not any(k.endswith(("A_log", "embedding.weight", ".D")) for k in changed)
            assert (out / "adapter" / "adapter_model.safetensors").is_file()
        model = out
    assert json.loads((model / "config.json").read_text())["model_type"] == config["model_type"]

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer.apply_chat_template(
        CONVERSATIONS[0]["messages"][:1],
        add_generation_prompt=True,
        return_dict=False,
        return_tensors="pt",
    )
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ours = load_model(model)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=1e-5, atol=1e-5)
    answer = theirs.generate(ids, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > ids.shape[1]


def test_a_bfloat16_folder_stays_one(stage: Stage, tmp_path: Path) -> None:
    """Trained as a whole in float32, as adapters in bfloat16; what must be float32 stays so."""
    model = chat_folder(tmp_path / "wide")
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model)
    data = write(tmp_path / "pairs.jsonl", PAIRS)
    for way in ("--full", "--lora"):
        out = tmp_path / way
        stage("dpo", "--model", model, "--data", data, "--out", out, way, *SMALL)
        for name, tensor in load_file(out / "model.safetensors").items():
            wide = name.rsplit(".", 1)[1] in ("A_log", "D", "dt_bias") or ".lambda_" in name
            assert tensor.dtype is (torch.float32 if wide else torch.bfloat16), name


@pytest.mark.parametrize(("name", "way"), [("sft", "--full"), ("midtrain", "--lora")])
def test_an_interrupted_run_continues(stage: Stage, name: str, way: str, tmp_path: Path) -> None:
    """The same command again ends with the same weights as a run that was never cut."""
    model = chat_folder(tmp_path / "base")
    data, out = write(tmp_path / "chats.jsonl", CONVERSATIONS), tmp_path / "out"
    words = ("--model", model, "--data", data, "--out", out, way, "--save-steps", "1", *SMALL)
    stage(name, *words)
    whole = load_file(out / "model.safetensors")
    shutil.rmtree(out / "checkpoints" / "checkpoint-3")  # as if cut after the second step
    for file in ("config.json", "model.safetensors"):
        (out / file).unlink()
    with pytest.raises(SystemExit):
        stage(name, *words, "--seed", "1")
    stage(name, *words)
    state = json.loads((out / "checkpoints" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    again = load_file(out / "model.safetensors")
    assert all(torch.equal(again[key], whole[key]) for key in whole)


def test_a_finished_or_other_run_is_not_overwritten(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    words = ("--model", tmp_path, "--data", tmp_path / "x", "--out", out)
    with pytest.raises(SystemExit) as exited:
        stage("sft", *words)
    assert exited.value.code == 2
    assert re.search(r"error: .*x does not exist; give a file of JSON", capsys.readouterr().err)
    with pytest.raises(SystemExit):
        stage("sft", *words, "--rank", "4")
    assert "started with rank = 16, not 4" in capsys.readouterr().err
    (out / "config.json").write_text("{}")
    with pytest.raises(SystemExit):
        stage("sft", *words)
    assert "holds a finished model" in capsys.readouterr().err


GOOD = json.dumps(CONVERSATIONS[0])
USER, ANSWER = CONVERSATIONS[0]["messages"]
BAD = [
    ("sft", [GOOD, "", "{"], r"data.jsonl:3: not JSON"),
    ("sft", [GOOD, "[1]"], r"data.jsonl:2: a list; give one JSON object"),
    ("sft", ['{"text": "a"}'], r"data.jsonl:1: the field 'messages' is missing \(found 'text'\)"),
    ("sft", [json.dumps({"messages": [USER]})], r":1: 'messages' must end with .* the assistant"),
    ("sft", [json.dumps({"messages": [ANSWER]})], r":1: 'messages' holds an answer only"),
    ("sft", [json.dumps({"messages": []})], r":1: 'messages' must be a list of messages"),
    ("sft", ['{"messages": [{"role": "bot"}]}'], r"messages\[0\] needs a 'role' that is one of"),
    ("sft", ['{"messages": [{"role": "user"}]}'], r"messages\[0\] needs a 'content' that is text"),
    ("sft", ["", ""], r"data.jsonl has no rows"),
    ("sft", ["\ufeff" + GOOD, "{"], r"data.jsonl:2: not JSON"),
    ("midtrain", [GOOD, '{"text": "a"}'], r":2: other fields than .*; give all lines messages"),
    ("midtrain", ['{"text": " "}'], r":1: the field 'text' must be text that is not empty"),
    ("dpo", ['{"prompt": "a", "chosen": "b"}'], r":1: the field 'rejected' is missing \(found"),
    ("dpo", ['{"prompt": "a", "chosen": "b", "rejected": "b"}'], r":1: .* are equal"),
    ("dpo", [json.dumps(PAIRS[0] | {"prompt": [ANSWER]})], r"'prompt' must end with .* the user"),
]


@pytest.mark.parametrize(("name", "lines", "message"), BAD)
def test_bad_data_is_one_line_that_names_the_line(
    stage: Stage, name: str, lines: list[str], message: str, tmp_path: Path, capsys: Any
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(SystemExit) as exited:
        stage(name, "--model", tmp_path, "--data", data, "--out", tmp_path / "out")
    assert exited.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert re.search("error: .*" + message, said[0])


def test_models_and_tokenizers_that_do_not_fit(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data.jsonl", CONVERSATIONS)
    model = chat_folder(tmp_path / "base")

    def message(*words: str | Path) -> str:
        with pytest.raises(SystemExit):
            stage("sft", "--data", data, "--out", tmp_path / "out", *words)
        shutil.rmtree(tmp_path / "out")
        return capsys.readouterr().err

    assert "base/nowhere does not exist" in message("--model", model / "nowhere")
    assert "every row is longer" in message("--model", model, "--max-length", "5")
    (model / "chat_template.jinja").unlink()
    assert "no chat template; give one with --template" in message("--model", model)
    (model / "tokenizer.json").unlink()
    assert "no tokenizer.json" in message("--model", model)


def test_long_rows_are_dropped_and_counted(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = chat_folder(tmp_path / "base")
    long = [{"messages": [USER, {"role": "assistant", "content": "1" * 80}]}]
    data = write(tmp_path / "data.jsonl", CONVERSATIONS + long)
    stage("sft", "--model", model, "--data", data, "--out", tmp_path / "out", *SMALL)
    assert "dropped 1 of 10 rows above 64 tokens" in capsys.readouterr().out


def shown(language: str) -> list[str]:
    """The code blocks of the document."""
    found = re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, flags=re.DOTALL | re.MULTILINE)
    assert found
    return found


def test_the_document_shows_commands_and_data_that_are_accepted(
    stage: Stage, tmp_path: Path
) -> None:
    stages = set()
    for line in "".join(shown("sh")).splitlines():
        _, script, *words = line.split()
        stages.add(Path(script).stem)
        importlib.import_module(Path(script).stem).options().parse_args(words)
    assert stages == {"midtrain", "sft", "dpo"}
    chat, text, pair = "".join(shown("json")).splitlines()
    rollouts = importlib.import_module("rollouts")
    for parse, line in (
        (rollouts.document, chat),
        (rollouts.document, text),
        (rollouts.answer, chat),
        (rollouts.preference, pair),
    ):
        file = tmp_path / "data.jsonl"
        file.write_text(line)
        assert len(rollouts.read(file, parse)) == 1
        file.unlink()


@pytest.mark.parametrize("code", shown("py"), ids=lambda code: f"{len(code)} characters")
def test_the_code_in_the_document_runs(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "torchao" in code:
        pytest.importorskip("torchao", reason="torchao is not installed")
    monkeypatch.chdir(tmp_path)
    chat_folder(tmp_path / "Phi-4-mini-flash-reasoning", OFFICIAL)
    variables: dict[str, Any] = {}
    exec(compile(code, "fine-tuning.md", "exec"), variables)
    model = variables.get("model") or variables["trainer"].model
    assert bool(torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["midtrain", "sft", "dpo"])
def test_the_command_line_answers(name: str) -> None:
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--learning-rate" in result.stdout
