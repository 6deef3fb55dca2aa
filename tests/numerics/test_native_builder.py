"""Building the C++ kernels: caching, damage, rivals, and life without a compiler."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sambay.ops import registry
from sambay.ops.causal_conv import causal_conv, causal_conv_step
from sambay.ops.causal_conv import native as causal_conv_native
from sambay.ops.native import builder, library
from sambay.ops.selective_scan import native as selective_scan_native
from sambay.ops.selective_scan import selective_scan, selective_scan_step
from tests.numerics.twins import assert_alike
from tests.train.processes import together

needs_compiler = pytest.mark.skipif(
    library.why_unavailable() is not None, reason=str(library.why_unavailable())
)
SCAN_TWICE = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(message)s")
import torch
from sambay.ops.selective_scan import selective_scan
x = torch.ones(1, 3, 2, requires_grad=True)
for _ in range(2):
    y, _ = selective_scan(
        x, x, -torch.ones(2, 2), x, x, torch.ones(2), delta_bias_E=torch.zeros(2)
    )
y.sum().backward()
print("gradient", x.grad.isfinite().all().item())
"""


def start(script: str, cache: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "XDG_CACHE_HOME": str(cache), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> list[str]:
    output, complaints = process.communicate(timeout=250)
    assert process.returncode == 0, complaints
    assert complaints == ""
    return output.splitlines()


def libraries(cache: Path) -> list[Path]:
    return sorted(cache.glob("sambay/native/*/kernels-*.so"))


# Whose compilation takes no time: what is built is not what the builder is about.
SMALL = """
extern "C" __attribute__((visibility("default"))) int answer() { return 42; }
"""


@pytest.fixture(scope="module")
def small_source(tmp_path_factory) -> Path:
    source = tmp_path_factory.mktemp("source") / "small.cpp"
    source.write_text(SMALL)
    return source


@pytest.fixture
def small(small_source, monkeypatch) -> None:
    """A library of one function in place of the kernels."""
    monkeypatch.setattr(builder, "_sources", lambda: [small_source])


@pytest.mark.parametrize("broken", [False, True], ids=["no compiler", "a broken compiler"])
def test_without_a_compiler_torch_serves_and_says_so_once(broken, tmp_path, monkeypatch, caplog):
    compiler = tmp_path / "compiler"
    reason = (
        f"CXX names '{compiler}', which is not a program; install one (for example: apt install"
    )
    if broken:
        compiler.write_text("#!/bin/sh\necho 'boom: internal compiler error' >&2\nexit 4\n")
        compiler.chmod(0o755)
        reason = f"the C++ compiler {compiler} failed: boom: internal compiler error"
    for name, value in (("XDG_CACHE_HOME", tmp_path / "cache"), ("CXX", compiler), ("PATH", "")):
        monkeypatch.setenv(name, str(value))
    # As in a process that has not asked for the kernels yet.
    monkeypatch.setattr(library, "_outcome", None)
    monkeypatch.setattr(registry, "_logged", set())
    caplog.set_level(logging.INFO, "sambay.ops")
    x = torch.ones(1, 3, 2, requires_grad=True)
    for _ in range(2):
        y, _ = selective_scan(
            x, x, -torch.ones(2, 2), x, x, torch.ones(2), delta_bias_E=torch.zeros(2)
        )
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.isfinite().all()
    (warning,) = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert reason in warning
    assert "selective_scan: using backend 'torch' (native: " in caplog.text
    assert not libraries(tmp_path / "cache")


def test_a_compiler_is_looked_for_where_the_user_says(monkeypatch, tmp_path):
    for name in ("g++", "clang++", "mine"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert builder._compiler() == [str(tmp_path / "g++")]
    monkeypatch.setenv("CXX", "mine --fast")
    assert builder._compiler() == [str(tmp_path / "mine"), "--fast"]
    monkeypatch.setenv("CXX", "yours")
    with pytest.raises(builder.BuildError, match="CXX names 'yours'"):
        builder._compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(builder.BuildError, match="there is no C"):
        builder._compiler()


@needs_compiler
def test_two_processes_build_once(small, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compile_it, times = builder._compile, tmp_path / "times"

    def noted(compiler, scratch):
        with times.open("a") as file:
            file.write("compiled\n")
        return compile_it(compiler, scratch)

    monkeypatch.setattr(builder, "_compile", noted)
    assert together(2, lambda: builder.load().answer(), tmp_path / "answers") == [42, 42]
    assert times.read_text() == "compiled\n"
    assert len(libraries(tmp_path)) == 1


@pytest.mark.slow
@needs_compiler
def test_two_commands_build_once_and_both_work(tmp_path):
    rivals = [start(SCAN_TWICE, tmp_path) for _ in range(2)]
    outputs = [finish(rival) for rival in rivals]
    assert all("INFO selective_scan: using backend 'native'" in lines for lines in outputs)
    built = [line for lines in outputs for line in lines if "built the C++ kernels" in line]
    assert len(built) == 1
    assert len(libraries(tmp_path)) == 1


@pytest.fixture(scope="module")
def built(small_source, tmp_path_factory) -> Path:
    """A cache in which the library lies ready."""
    cache = tmp_path_factory.mktemp("with a space")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setattr(builder, "_sources", lambda: [small_source])
        builder.load()
    return cache


@needs_compiler
def test_a_second_load_does_not_compile(built, small, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(built))
    monkeypatch.setattr(builder, "_compile", None)
    assert builder.load().answer() == 42


@needs_compiler
@pytest.mark.parametrize("damage", ["cut short", "one bit", "empty"])
def test_a_damaged_library_is_built_again(damage, built, small, tmp_path, monkeypatch, caplog):
    (intact,) = libraries(built)
    content = bytearray(intact.read_bytes())
    if damage == "cut short":
        content = content[: len(content) // 2]
    elif damage == "one bit":
        content[len(content) // 2] ^= 1
    else:
        content.clear()
    damaged = tmp_path / intact.relative_to(built)
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(content)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # The compiler itself is not what this is about.
    monkeypatch.setattr(builder, "_compile", lambda compiler, scratch: intact)
    assert builder.load().answer() == 42
    assert libraries(tmp_path) == [damaged]
    assert damaged.read_bytes() == intact.read_bytes()
    assert f"{damaged} is damaged" in caplog.text


@needs_compiler
def test_an_intact_file_that_does_not_load_is_built_again(built, small, tmp_path, monkeypatch):
    (intact,) = libraries(built)
    content = b"made for another system"
    foreign = tmp_path / intact.parent.relative_to(built) / f"kernels-{builder._digest(content)}.so"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(content)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(builder, "_compile", lambda compiler, scratch: intact)
    assert builder.load().answer() == 42
    assert [path.name for path in libraries(tmp_path)] == [intact.name]


@needs_compiler
def test_a_cache_that_cannot_be_written_only_costs_the_next_start(
    built, small, tmp_path, monkeypatch
):
    (intact,) = libraries(built)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(builder, "_compile", lambda compiler, scratch: intact)
    assert builder.load().answer() == 42


@needs_compiler
def test_the_key_follows_what_a_build_depends_on(monkeypatch, tmp_path):
    compiler = builder._compiler()
    keys = {builder._key(compiler)}
    keys.add(builder._key([*compiler, "-O1"]))
    monkeypatch.setattr(builder, "_processor", lambda: "another")
    keys.add(builder._key(compiler))
    source = tmp_path / "kernels.cpp"
    source.write_text("int main() {}")
    monkeypatch.setattr(builder, "_sources", lambda: [source])
    keys.add(builder._key(compiler))
    assert len(keys) == 4


@needs_compiler
def test_flags_a_compiler_does_not_know_are_left_out(small, tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "CPU_FLAGS", [["-mcpu=no-such-processor"], []])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert builder.load().answer() == 42


# In a process of its own, since packages that other tests import bring a second one.
ONE_OPENMP = """
from sambay.ops.native import library
library.kernels()
(ours,) = library._mapped_openmp()
assert "torch" in ours.parent.parent.name or "torch" in ours.parent.name, ours
try:
    import sklearn.cluster
except ImportError:
    pass
assert library._mapped_openmp()[0] == ours, library._mapped_openmp()
assert library._find_openmp() is not None
"""


@pytest.mark.slow
@needs_compiler
def test_torchs_own_openmp_is_used_and_no_second_one():
    command = [sys.executable, "-c", ONE_OPENMP]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_sources_are_found_beside_the_builder():
    assert {path.name for path in builder._sources()} == {
        "causal_conv.cpp",
        "decode_attention.cpp",
        "decode_differential.cpp",
        "grouped_linear.cpp",
        "mamba_step.cpp",
        "replay.cpp",
        "selective_scan_backward.cpp",
        "selective_scan_forward.cpp",
        "skinny_linear.cpp",
        "step.cpp",
        "step_rows.cpp",
    }


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 processors")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3"])
def test_narrower_vectors_without_openmp_give_the_same(processor, tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def scan_and_convolve() -> list[torch.Tensor]:
        x, delta, B, C = (torch.randn(3, 70, 37, generator=generator) for _ in range(4))
        A, D = -torch.rand(37, 37, generator=generator), torch.randn(37, generator=generator)
        leaves = [tensor.requires_grad_() for tensor in (x, delta, A, B, C, D)]
        y, state = selective_scan(*leaves, delta_bias_E=D, backend="native")
        mixed = causal_conv(y, A[:, :4], D, backend="native")
        z = selective_scan_step(
            x[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], D, delta_bias_E=D, state_BEN=state.detach()
        )
        w = causal_conv_step(z, A[:, :4], D, state_BCE=x[:, :3].detach().clone())
        return [z, w, y, *torch.autograd.grad(mixed.sum() + state.sum(), leaves)]

    expected = scan_and_convolve()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(builder, "CPU_FLAGS", [[f"-march={processor}"]])
    monkeypatch.setattr(library, "_find_openmp", lambda: None)
    narrow = library._prepare(builder.load())
    for module in (library, causal_conv_native, selective_scan_native):
        monkeypatch.setattr(module, "kernels", lambda: narrow)
    generator.manual_seed(0)
    actual = scan_and_convolve()
    assert any(not torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert_alike(actual, expected, 1e-5)
