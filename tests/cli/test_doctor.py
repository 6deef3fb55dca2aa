"""`sambay doctor` says what is there, what is not, and why, and never fails."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from pathlib import Path

import pytest

from sambay.cli import doctor
from sambay.ops import registry
from sambay.ops.native import library


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return doctor.run(parser.parse_args(words))


def section(text: str, title: str) -> list[str]:
    lines = text.splitlines()
    start = lines.index(title) + 1
    end = next((n for n in range(start, len(lines)) if not lines[n]), len(lines))
    return lines[start:end]


def test_text_and_json_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    text = capsys.readouterr().out
    assert run("--json") == 0
    report = json.loads(capsys.readouterr().out)
    for title, rows in report.items():
        lines = section(text, title.capitalize())
        assert len(lines) == len(rows) > 0
    assert [row["name"] for row in report["packages"]] == list(doctor.PACKAGES)


def test_every_operation_is_listed_with_all_its_backends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.table()  # registers all real ones first
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
    registry.register("test_op", "slow", 0, lambda: None)
    registry.register("test_op", "fast", 1, lambda: None, lambda call: "it needs a better machine")
    run()
    lines = section(capsys.readouterr().out, "Operations")
    assert len(lines) == len(registry.table())
    assert {"attention", "causal_conv", "selective_scan"} <= {line.split()[0] for line in lines}
    fast, slow = lines[-2:]
    assert " ".join(fast.split()) == "test_op fast unavailable: it needs a better machine"
    assert slow.split() == ["slow", "available,", "used", "by", "default"]


def test_columns_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    run()
    lines = section(capsys.readouterr().out, "Packages")
    versions = [line.index(line.split()[1]) for line in lines]
    assert len(set(versions)) == 1


def test_missing_package_names_the_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "pyarrow":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert run() == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "pyarrow" in line)
    assert "missing" in line
    assert 'pip install "sambay[data]"' in line


def test_without_a_compiler_the_reason_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # As in a process that has not asked for the kernels yet.
    monkeypatch.setattr(library, "_outcome", None)
    assert run("--json") == 0
    report = json.loads(capsys.readouterr().out)
    compiler, kernels, cache = report["compiler"]
    assert compiler["value"] == kernels["value"] == "none"
    assert "no-such-compiler" in kernels["remark"]
    assert cache["value"].startswith("0 builds")
    scan = {row["backend"]: row for row in report["operations"] if row["op"] == "selective_scan"}
    assert not scan["native"]["available"]
    assert "no-such-compiler" in scan["native"]["reason"]
    assert scan["torch"]["available"]
