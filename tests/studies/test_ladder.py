"""Ladders: what is planned, refused, trained, adopted, and written down, whatever goes wrong."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO, StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sambay.cli.main import main
from sambay.data.manifest import Manifest
from sambay.errors import ConfigError, DataError
from sambay.files import write_json
from sambay.spec import presets
from sambay.studies import queue, worker
from sambay.studies.ladder import Outcome, Runner
from sambay.studies.ledger import Ledger
from sambay.studies.members import Member, Order, expand, in_order, run_flops
from sambay.studies.progress import Display
from sambay.studies.queue import Claim, Slot, slots
from sambay.studies.results import result_of
from sambay.studies.table import on_one_axis, page, read_table
from sambay.train.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    Device,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
)
from sambay.train.loop import train
from sambay.train.metrics import read_metrics
from sambay.train.resilience import TrainingDiverged
from sambay.train.run_dir import claimed
from tests.studies import pretend_worker
from tests.train.conftest import make_data

SEQUENCE, ROWS = 13, 4
Build = Callable[[str, int, int], RunConfig]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("prepared"))


def tiny(architecture: str, depth: int, seed: int, data: str, steps: int = 3) -> RunConfig:
    model = presets.build(
        architecture, depth, vocab_size=Manifest.read(Path(data)).vocab_size,
        hidden_size=4 * depth, intermediate_size=5 * depth, num_heads=depth // 2,
        num_kv_heads=depth // 4, head_dim=4, d_state=2,
    )  # fmt: skip
    return RunConfig(
        model=model,
        data=DataConfig(data, sequence_length=SEQUENCE),
        optimizer=OptimizerConfig(peak_learning_rate=3e-3),
        schedule=ScheduleConfig(steps * ROWS * SEQUENCE, warmup_tokens=ROWS * SEQUENCE),
        batch=BatchConfig(ROWS, ROWS),
        evaluation=EvaluationConfig(every_steps=50, max_tokens=SEQUENCE * 9),
        checkpoint=CheckpointConfig(every_steps=2, keep=1),
        seed=seed,
        threads=1,
    )


@pytest.fixture
def build(data: Path) -> Build:
    return lambda architecture, depth, seed: tiny(architecture, depth, seed, str(data))


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Workers that only pretend; called with what goes wrong in which run."""
    monkeypatch.setattr(queue, "WORKER", "tests.studies.pretend_worker")
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", str(root), prepend=os.pathsep)

    def wrong(**runs: str) -> None:
        monkeypatch.setenv("PRETEND", json.dumps({n.replace("_", "-"): w for n, w in runs.items()}))

    wrong()
    return wrong


def climb(members: list[Member], out: Path, **options: Any) -> Outcome:
    places = options.pop("places", [Slot()])
    return Runner(members, out, places, display=Display(StringIO()), **options).run()


def events(out: Path, kind: str) -> list[str]:
    lines = [json.loads(line) for line in (out / "ladder.jsonl").read_text().splitlines()]
    return [line["run"] for line in lines if line["event"] == kind]


# What is planned


def test_what_cannot_be_built_is_listed_with_the_reason(build: Build) -> None:
    members = expand(build, ["sambay", "sambay+da"], [8, 12], [1])
    impossible = [one for one in members if one.config is None]
    assert [one.name for one in impossible] == ["sambay+da-d12-s1"]
    assert "model.num_kv_heads = 3 is odd" in impossible[0].reason


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((["sambai"], [8], [1]), "preset 'sambai' does not exist"),
        ((["sambay", "sambay"], [8], [1]), "architecture sambay is given twice"),
        ((["sambay"], [8, 8], [1]), "depth 8 is given twice"),
        ((["../x"], [8], [1]), "cannot name a folder"),
        ((["sambay+da"], [12], [1]), "no run of this ladder can be built.*num_kv_heads = 3"),
    ],
)
def test_plans_that_make_no_sense(build: Build, words: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand(build, *words)


def test_a_recipe_that_ignores_an_argument_is_refused(build: Build) -> None:
    with pytest.raises(ConfigError, match="makes nothing of its argument seed"):
        expand(lambda name, depth, seed: build(name, depth, 1), ["sambay"], [8, 12], [1, 2])
    with pytest.raises(ConfigError, match="makes nothing of its argument architecture"):
        expand(lambda _, depth, seed: build("samba", depth, seed), ["samba", "sambay"], [8], [1])
    # Without a cross-decoder these two are one model, which is nobody's mistake.
    both = expand(build, ["samba+yoco", "sambay"], [4, 8], [1])
    assert both[0].config == both[2].config
    assert both[1].config != both[3].config


def test_the_order_of_the_queue(build: Build) -> None:
    members = expand(build, ["sambay"], [12, 8], [2, 1])
    names = {order: [one.name[7:] for one in in_order(members, order)] for order in Order}
    assert names[Order.COST] == ["d8-s1", "d8-s2", "d12-s1", "d12-s2"]
    assert names[Order.SEED] == ["d8-s1", "d12-s1", "d8-s2", "d12-s2"]
    assert names[Order.GIVEN] == ["d12-s2", "d12-s1", "d8-s2", "d8-s1"]
    config = members[0].config
    assert config is not None
    twice = replace(config, schedule=ScheduleConfig(2 * config.schedule.total_tokens))
    assert run_flops(twice) == 2 * run_flops(config)


# What is refused before anything starts

CHANGES: dict[str, Callable[[RunConfig], RunConfig]] = {
    "data.sequence_length": lambda c: replace(c, data=replace(c.data, sequence_length=7)),
    "data.separate_documents": lambda c: replace(c, data=replace(c.data, separate_documents=True)),
    "batch.global_batch_size": lambda c: replace(c, batch=BatchConfig(2, 2)),
    "evaluation.max_tokens": lambda c: replace(c, evaluation=EvaluationConfig(max_tokens=99)),
    "seed": lambda c: replace(c, seed=c.seed + 100),
}


@pytest.mark.parametrize("field", CHANGES)
def test_runs_that_saw_different_data_are_refused(build: Build, field: str, tmp_path: Path) -> None:
    def other(architecture: str, depth: int, seed: int) -> RunConfig:
        config = build(architecture, depth, seed)
        return CHANGES[field](config) if depth == 12 else config

    members = expand(other, ["sambay"], [8, 12], [1])
    with pytest.raises(ConfigError, match=rf"^{field} = .* in sambay-d12-s1, but .*-d8-s1"):
        Ledger(members, tmp_path)
    assert not any(tmp_path.iterdir())


def test_other_data_under_another_name_is_refused(build: Build, tmp_path: Path) -> None:
    elsewhere = str(make_data(tmp_path / "other", seed=1))

    def other(architecture: str, depth: int, seed: int) -> RunConfig:
        config = build(architecture, depth, seed)
        data = config.data.replace(directory=elsewhere)
        return replace(config, data=data) if depth == 12 else config

    with pytest.raises(ConfigError, match=r"^(data.directory|model.vocab_size) = "):
        Ledger(expand(other, ["sambay"], [8, 12], [1]), tmp_path)


def test_a_table_of_other_runs_has_a_say(
    build: Build, pretend: Callable[..., None], tmp_path: Path
) -> None:
    climb(expand(build, ["sambay"], [8], [1]), tmp_path)
    change = CHANGES["batch.global_batch_size"]
    others = expand(lambda *words: change(build(*words)), ["sambay"], [12], [1])
    with pytest.raises(ConfigError, match=r"^batch.global_batch_size = 2 in sambay-d12-s1, but 4"):
        Ledger(others, tmp_path)
    change = CHANGES["seed"]
    others = expand(lambda *words: change(build(*words)), ["sambay"], [12], [1])
    with pytest.raises(ConfigError, match=r"^seed = 101 in sambay-d12-s1, but 1 in sambay-d8-s1"):
        Ledger(others, tmp_path)
    others = expand(lambda *words: change(build(*words)), ["sambay"], [12], [2])
    Ledger(others, tmp_path)  # the second seed may have any order


def test_a_directory_with_another_run_is_refused(
    build: Build, pretend: Callable[..., None], tmp_path: Path
) -> None:
    climb(expand(build, ["sambay"], [8], [1]), tmp_path)

    def other(architecture: str, depth: int, seed: int) -> RunConfig:
        return replace(build(architecture, depth, seed), optimizer=OptimizerConfig(1e-4))

    message = r"^optimizer.peak_learning_rate = 0.0001, but .*runs/sambay-d8-s1 holds .* 0.003"
    with pytest.raises(ConfigError, match=message):
        Ledger(expand(other, ["sambay"], [8], [1]), tmp_path)
    small = expand(  # another cut of the batch changes nothing but rounding
        lambda *words: replace(build(*words), batch=BatchConfig(4, 2)), ["sambay"], [8], [1]
    )
    assert Ledger(small, tmp_path).is_finished(small[0])


def test_a_damaged_table_is_no_reason_to_lose_runs(
    build: Build, pretend: Callable[..., None], tmp_path: Path
) -> None:
    members = expand(build, ["sambay"], [8], [1])
    before = climb(members, tmp_path).rows
    (tmp_path / "table.json").write_text("{")
    with pytest.raises(DataError, match=r"table.json is damaged"):
        climb(members, tmp_path)
    (tmp_path / "table.json").unlink()
    assert climb(members, tmp_path).rows == before
    assert events(tmp_path, "start") == ["sambay-d8-s1"]


def test_the_papers_flops_are_those_of_the_reference_of_the_same_depth() -> None:
    def row(architecture: str, depth: int, parameters: int) -> dict[str, Any]:
        counts = {"parameters_without_embeddings": parameters, "tokens": 10}
        return {"architecture": architecture, "depth": depth} | counts

    rows = {
        "a": row("transformer++", 8, 100),
        "b": row("sambay", 8, 103),
        "c": row("sambay", 12, 205),
        "d": {"architecture": "sambay+da", "depth": 12, "state": "unbuildable"},
    }
    written = on_one_axis(rows)
    flops = {name: row.get("paper_flops") for name, row in written.items()}
    assert flops == {"a": 6000, "b": 6000, "c": 12300, "d": None}


# What is trained


def test_all_runs_are_trained_once_and_written_down(
    build: Build, pretend: Callable[..., None], data: Path, tmp_path: Path
) -> None:
    members = expand(build, ["sambay", "sambay+da"], [8, 12], [1])
    outcome = climb(members, tmp_path, places=[Slot(threads=2), Slot(threads=2)])
    assert (outcome.finished, outcome.failed, outcome.pending, outcome.unbuildable) == (3, 0, 0, 1)
    row = read_table(tmp_path)["sambay-d12-s1"]
    assert row["state"] == "finished"
    assert row["validation_loss"] == pytest.approx(5.0 - 48 / 50 + 1 / 1000)
    assert row["width"] == 48
    assert row["tokens"] == 3 * ROWS * SEQUENCE
    assert row["flops"] == members[1].flops
    assert row["paper_flops"] == 6 * row["parameters_without_embeddings"] * row["tokens"]
    assert row["paper_flops"] < row["flops"]
    assert (
        row["parameters"] - row["parameters_without_embeddings"]
        == 48 * Manifest.read(data).vocab_size
    )
    assert (tmp_path / "runs/sambay-d8-s1/starts.txt").read_text() == "auto 2\n"
    text = (tmp_path / "table.md").read_text()
    assert "| sambay+da | 8 | 32 | 1 |" in text
    assert "Cannot be built:\n\n- sambay+da-d12-s1: model.num_kv_heads = 3 is odd" in text
    assert climb(members, tmp_path).rows == outcome.rows
    assert sorted(events(tmp_path, "start")) == sorted(one.name for one in members[:3])


def test_more_sizes_later_join_the_same_table(
    build: Build, pretend: Callable[..., None], tmp_path: Path
) -> None:
    climb(expand(build, ["sambay"], [8], [1, 2]), tmp_path)
    rows = climb(expand(build, ["sambay"], [4, 8], [1]), tmp_path).rows
    assert [row["name"] for row in json.loads((tmp_path / "table.json").read_text())["runs"]] == [
        "sambay-d4-s1", "sambay-d8-s1", "sambay-d8-s2",
    ]  # fmt: skip
    assert {row["state"] for row in rows.values()} == {"finished"}


def test_what_goes_wrong_in_one_run_does_not_stop_the_others(
    build: Build, pretend: Callable[..., None], tmp_path: Path
) -> None:
    members = expand(build, ["samba", "sambay", "mambay", "sambay-a"], [8], [1])
    wrong = {"samba_d8_s1": "diverge", "sambay_d8_s1": "fail", "mambay_d8_s1": "crash"}
    pretend(**wrong)
    outcome = climb(members, tmp_path)
    assert (outcome.finished, outcome.failed) == (1, 3)
    rows = outcome.rows
    assert rows["samba-d8-s1"]["state"] == "diverged"
    assert rows["samba-d8-s1"]["reason"] == "step 3: the loss is nan"
    assert rows["sambay-d8-s1"]["reason"] == "the disk is full"
    assert rows["mambay-d8-s1"]["reason"].startswith("RuntimeError: a bug; see ")
    assert "Diverged:\n\n- samba-d8-s1: step 3: the loss is nan" in page(rows.values())

    pretend()  # the causes are gone: what failed is tried again, what diverged only if asked for
    outcome = climb(members, tmp_path)
    assert (outcome.finished, outcome.failed) == (3, 1)
    assert outcome.rows["samba-d8-s1"]["reason"] == "step 3: the loss is nan"
    assert climb(members, tmp_path, retry=True).finished == 4


def test_killed_runs_are_tried_again_but_not_for_ever(
    build: Build, pretend: Callable[..., None], tmp_path: Path
) -> None:
    pretend(samba_d8_s1="kill", sambay_d8_s1="kill once")
    outcome = climb(expand(build, ["samba", "sambay"], [8], [1]), tmp_path)
    assert events(tmp_path, "start").count("samba-d8-s1") == 3
    assert events(tmp_path, "start").count("sambay-d8-s1") == 2
    assert outcome.rows["samba-d8-s1"]["reason"].startswith("killed by SIGKILL; see ")
    assert outcome.rows["sambay-d8-s1"]["state"] == "finished"


def test_the_time_is_over(build: Build, pretend: Callable[..., None], tmp_path: Path) -> None:
    pretend(sambay_d8_s1="wait")
    outcome = climb(expand(build, ["sambay"], [8, 12], [1]), tmp_path, minutes=2 / 60)
    assert outcome.budget_is_spent
    assert (outcome.finished, outcome.pending) == (0, 2)
    assert (tmp_path / "runs/sambay-d8-s1/saved").exists()
    assert not (tmp_path / "runs/sambay-d12-s1").exists()


def test_a_signal_lets_runs_save(
    build: Build, pretend: Callable[..., None], tmp_path: Path
) -> None:
    pretend(sambay_d8_s1="wait")
    waits = tmp_path / "runs/sambay-d8-s1/waits"

    def interrupt() -> None:
        while not waits.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    outcome = climb(expand(build, ["sambay"], [8], [1]), tmp_path)
    thread.join()
    assert outcome.stopped_by == signal.SIGINT
    assert (tmp_path / "runs/sambay-d8-s1/saved").exists()
    assert outcome.rows["sambay-d8-s1"]["state"] == "pending"


def test_two_runners_share_the_work(
    build: Build, pretend: Callable[..., None], tmp_path: Path
) -> None:
    members = expand(build, ["samba", "sambay", "mambay"], [8], [1, 2])
    threads = [threading.Thread(target=climb, args=(members, tmp_path)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(events(tmp_path, "start")) == sorted(one.name for one in members)
    assert {row["state"] for row in read_table(tmp_path).values()} == {"finished"}


def test_a_run_of_sambay_train_is_waited_for_and_adopted(
    build: Build, pretend: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sambay.studies.ladder._LOOK_AGAIN", 0.1)
    (member,) = members = expand(build, ["sambay"], [8], [1])
    run_dir = tmp_path / "runs" / member.name
    with claimed(run_dir):
        assert Claim.take(tmp_path, member.name) is None
        thread = threading.Thread(target=climb, args=(members, tmp_path))
        thread.start()
        time.sleep(0.5)
        assert member.config is not None
        pretend_worker.write_end(run_dir, member.config.to_dict())
    thread.join()
    assert events(tmp_path, "start") == []
    assert read_table(tmp_path)[member.name]["state"] == "finished"


def test_a_real_run_is_read(build: Build, tmp_path: Path) -> None:
    (member,) = members = expand(build, ["sambay"], [8], [1])
    assert member.config is not None
    run_dir = tmp_path / "runs" / member.name
    train(member.config, run_dir)
    outcome = climb(members, tmp_path)
    assert not events(tmp_path, "start")
    row, last = outcome.rows[member.name], read_metrics(run_dir)[-1]
    assert row["validation_loss"] == last["validation_loss"]
    assert row["validation_bits_per_byte"] == last["validation_bits_per_byte"]
    assert row["seconds"] == pytest.approx(last["seconds"], abs=1e-3)
    assert row["place"]["device"] == "cpu"
    assert "commit" not in json.dumps(row)
    # Without its model it has to be finished; freed of its checkpoints too it still counts.
    (run_dir / "model").rename(run_dir / "away")
    assert result_of(run_dir, member.config) is None
    (run_dir / "checkpoints").rename(run_dir / "away/checkpoints")
    assert result_of(run_dir, member.config) is not None
    longer = replace(member.config, schedule=ScheduleConfig(9 * ROWS * SEQUENCE))
    assert result_of(run_dir, longer) is None


def test_other_data_than_a_run_was_trained_on_is_refused(
    build: Build, pretend: Callable[..., None], tmp_path: Path
) -> None:
    members = expand(build, ["sambay"], [8], [1])
    climb(members, tmp_path)
    state = {"format_version": 2, "data_manifest": "0" * 64}
    write_json(tmp_path / "runs/sambay-d8-s1/checkpoints/step-00000003/state.json", state)
    with pytest.raises(ConfigError, match=r"^data.directory holds other data \(manifest"):
        Ledger(members, tmp_path)


def test_devices(monkeypatch: pytest.MonkeyPatch, build: Build) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    two = slots(["cuda:0", "cuda:1"], 2, None)
    assert [one.environment()["CUDA_VISIBLE_DEVICES"] for one in two] == ["3", "5", "3", "5"]
    config = build("sambay", 8, 1)
    assert two[0].placed(config).device is Device.CUDA
    assert slots(["cpu"], 1, 3)[0].placed(config).threads == 3
    assert slots([], 1, None)[0].placed(config) == config
    with pytest.raises(ConfigError, match="cuda:2: CUDA_VISIBLE_DEVICES shows 2 devices"):
        slots(["cuda:2"], 1, None)
    with pytest.raises(ConfigError, match="--devices gpu: write cpu, cuda"):
        slots(["gpu"], 1, None)


# The process of a run


def test_the_worker_trains_and_says_how_it_ended(
    build: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(worker, "_stop_at_end_of_input", lambda: None)

    def ends_with(line: str) -> int:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=BytesIO(line.encode())))
        return worker.main([str(tmp_path / "run")])

    config = build("sambay", 8, 1)
    assert ends_with(json.dumps(config.to_dict())) == 0
    assert result_of(tmp_path / "run", config) is not None
    other = replace(config, seed=2)
    assert ends_with(json.dumps(other.to_dict())) == worker.REFUSED
    assert "error: seed = 2" in capsys.readouterr().err

    def diverge(*_: Any, **__: Any) -> None:
        raise TrainingDiverged("step 3")

    monkeypatch.setattr("sambay.train.loop.train", diverge)
    assert ends_with(json.dumps(config.to_dict())) == worker.DIVERGED


def test_a_worker_ends_with_whoever_started_it() -> None:
    code = (
        "import sys, time, threading\n"
        "from sambay.studies import worker\n"
        "sys.stdin.buffer.readline()\n"
        "threading.Thread(target=worker._stop_at_end_of_input, daemon=True).start()\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"{}\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"ready\n"
        process.stdin.close()
        assert process.wait() == -signal.SIGTERM


# The command


@pytest.fixture
def recipe(tmp_path: Path, data: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(
        "from tests.studies.test_ladder import tiny\n"
        "def family(architecture: str = 'sambay', depth: int = 8, seed: int = 1, steps: int = 3):\n"
        f"    return tiny(architecture, depth, seed, {str(data)!r}, steps)\n"
        "def lone(depth: int = 8):\n    return family()\n"
    )
    return f"{path}:family"


def test_the_command(
    recipe: str,
    pretend: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["scaling", "ladder", recipe, "--architectures", "sambay,samba", "--depths", "8,12",
             "--out", str(tmp_path / "out"), "steps=4"]  # fmt: skip
    assert main([*words, "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert planned.count("pending") == 4
    assert not (tmp_path / "out").exists()
    pretend(samba_d12_s1="wait")
    assert main([*words, "--minutes", "0.05", "--order", "given"]) == 3
    captured = capsys.readouterr()
    assert "run the same command again to go on" in captured.out
    pretend(samba_d12_s1="diverge")
    assert main([*words, "--processes", "2"]) == 1
    assert "3 finished, 1 failed or diverged" in capsys.readouterr().out
    pretend()
    assert main([*words, "--retry"]) == 0
    assert {row["steps"] for row in read_table(tmp_path / "out").values()} == {4}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["depth=8"], "depth=8 would fix what a ladder varies; use --depths"),
        (["--depths", "8,x"], "--depths = 'x'; it must be a whole number"),
        (["--depths", ","], "--depths ',' names nothing"),
        (["--processes", "0"], "--processes = 0; it must be a whole number >= 1"),
        (["--order", "cots"], "--order = 'cots' (did you mean 'cost'?)"),
        (["--architectures", "sambai"], "preset 'sambai' does not exist"),
        (["stepz=4"], "has no argument 'stepz' (did you mean 'steps'?)"),
        (["--seeds", "-1"], "--seeds"),
        (["--minutes", "0"], "--minutes = 0; it must be greater than 0"),
    ],
)
def test_mistakes(
    recipe: str, words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["scaling", "ladder", recipe, "--out", str(tmp_path / "out"), *words])
    except SystemExit as end:  # argparse's own
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_is_no_ladder(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    lone = recipe.replace(":family", ":lone")
    assert main(["scaling", "ladder", lone, "--out", "nowhere"]) == 2
    assert "has no argument architecture; a ladder needs" in capsys.readouterr().err


# Killed at any moment


def in_time(condition: Callable[[], bool], seconds: float = 180.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.fixture
def started(recipe: str) -> Iterator[Callable[[Path], subprocess.Popen[bytes]]]:
    running = []

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "sambay.cli.main", "scaling", "ladder", recipe,
                   "--architectures", "sambay", "--depths", "8", "--seeds", "1,2",
                   "--processes", "2", "--threads", "1", "--out", str(out), "steps=40"]  # fmt: skip
        paths = [str(Path(__file__).parents[2]), *os.environ.get("PYTHONPATH", "").split(":")]
        env = os.environ | {"PYTHONPATH": ":".join(path for path in paths if path)}
        running.append(subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_runners_and_runs_leave_the_same_table(
    started: Callable[[Path], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert started(whole).wait() == 0
    generator = random.Random(3)
    for victim in ("runner", "run", "runner"):
        runner = started(broken)
        assert in_time(lambda: bool(holders(broken)))
        time.sleep(generator.uniform(0.0, 4.0))
        if victim == "runner":
            runner.kill()
            # A run whose runner is gone saves and ends by itself.
            assert in_time(lambda: not holders(broken))
        else:
            os.kill(holders(broken)[0], signal.SIGKILL)
            assert in_time(lambda: bool(events(broken, "killed")))
            runner.terminate()
        runner.wait()
    assert started(broken).wait() == 0

    def rows(out: Path) -> dict[str, dict[str, Any]]:
        return {name: row | {"seconds": 0} for name, row in read_table(out).items()}

    assert rows(whole) == rows(broken)
    assert len(rows(whole)) == 2


def holders(out: Path) -> list[int]:
    """The processes that train in the run directories of a ladder."""
    found = []
    for lock in out.glob("runs/*/.lock"):
        text = lock.read_text().strip()
        if text and Path(f"/proc/{text}").exists():
            found.append(int(text))
    return found
