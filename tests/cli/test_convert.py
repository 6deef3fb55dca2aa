"""`sambay convert`: every direction, round trips to the byte, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sambay.cli.main import main
from sambay.hf import official
from sambay.hf.loading import load_model, read_config
from sambay.model.folder import load_model_folder, save_model_folder
from tests import tiny
from tests.hf.test_archscale import archscale_names
from tests.parity import formula_checkpoint as formula

ARCHSCALE = ("--parametrization", "mup++", "--window", 5)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["convert", *map(str, arguments)])
    streams = capsys.readouterr()
    return code, streams.out, streams.err


@pytest.fixture
def official_folder(tmp_path: Path) -> Path:
    """With all bits of its norms and D in use, and with token ids of its own in config.json."""
    config = formula.official_config(eos_token_id=7)
    formula.write_folder(tmp_path / "official", config, formula.tensors(config))
    return tmp_path / "official"


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """An ArchScale file that fits the official layout once its multipliers are folded."""
    model = tiny.tiny_model(
        "sambay+da", dtype=torch.float32, norm="layer", attention_bias=True, num_heads=6,
        num_kv_heads=2,
    )  # fmt: skip
    file = tmp_path / "scaling_mup_tie_sambayda_d8_ctx4096_swa5" / "iter-000009-ckpt.pth"
    file.parent.mkdir()
    torch.save({"model": archscale_names(model), "iter_num": 9}, file)
    save_model_folder(tmp_path / "wanted", model)
    return file


def equal_files(one: Path, other: Path) -> None:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype is second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


def test_official_to_native_and_back_is_exact(
    official_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, official_folder, tmp_path / "native", "--to", "native")
    assert code == 0
    assert f"reading {official_folder} as official (what it looks like)" in out
    assert "  2x(M S) M F G C, " in out
    assert " parameters, bfloat16" in out
    assert "without a tokenizer" in out
    code, _, _ = run(capsys, tmp_path / "native", tmp_path / "back", "--to", "official")
    assert code == 0
    equal_files(official_folder, tmp_path / "back")
    model = load_model(tmp_path / "native")
    wanted = official.load(official_folder)
    ids = tiny.random_ids(1, 9)
    with torch.no_grad():
        assert torch.equal(model(ids), wanted(ids))


def test_official_to_official_keeps_other_entries_of_the_config(
    official_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (official_folder, tmp_path / "copy", "--to", "official", "--max-shard-size", "9KB")
    assert run(capsys, *arguments)[0] == 0
    assert official.read(tmp_path / "copy")[1]["eos_token_id"] == 7
    assert len(list((tmp_path / "copy").glob("model-*.safetensors"))) > 3
    assert run(capsys, tmp_path / "copy", tmp_path / "one", "--to", "official")[0] == 0
    equal_files(official_folder, tmp_path / "one")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_to_official_and_back_is_exact(
    dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.tiny_model(
        "sambay+da", dtype=torch.float32, parametrization="standard", norm="layer",
        attention_bias=True, num_heads=6, num_kv_heads=2,
    )  # fmt: skip
    if dtype is torch.bfloat16:  # the official format has no float32 for these
        for name, parameter in model.named_parameters():
            if name.endswith(("mixer.D", "mixer.dt_bias")):
                parameter.data = parameter.data.bfloat16().float()
    save_model_folder(tmp_path / "native", model.to(dtype))
    assert run(capsys, tmp_path / "native", tmp_path / "official", "--to", "official")[0] == 0
    assert run(capsys, tmp_path / "official", tmp_path / "back", "--to", "native")[0] == 0
    equal_files(tmp_path / "native", tmp_path / "back")
    assert read_config(tmp_path / "back") == model.config


def test_archscale_to_native(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    code, out, err = run(
        capsys, run_file, tmp_path / "native", "--to", "native", *ARCHSCALE, "--tied",
        "--tokenizer", tmp_path,
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "as archscale (what it looks like)" in out
    assert "without a tokenizer" not in out
    equal_files(tmp_path / "wanted", tmp_path / "native")
    assert read_config(tmp_path / "native") == read_config(tmp_path / "wanted")
    assert (tmp_path / "native" / "tokenizer.json").read_text() == "{}"


def test_archscale_to_official_needs_folding(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (run_file, tmp_path / "official", "--to", "official", *ARCHSCALE)
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert "has no multipliers and this model has attention_scale" in err
    assert "add --fold-multipliers" in err
    code, out, _ = run(capsys, *arguments, "--fold-multipliers")
    assert code == 0
    assert "folding the residual multiplier 0.25 into" in out
    assert "folding the logit multiplier 2 into" in out
    assert "folding the attention scale" in out
    ids = tiny.random_ids(2, 9)
    with torch.no_grad():
        wanted = load_model_folder(tmp_path / "wanted")(ids)
        found = official.load(tmp_path / "official")(ids)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        target = tmp_path / dtype
        assert (
            run(capsys, tmp_path / "official", target, "--to", "native", "--dtype", dtype)[0] == 0
        )
        tensors = load_file(target / "model.safetensors")
        assert tensors["model.blocks.0.mixer.in_proj.weight"].element_size() == size
        assert tensors["model.blocks.0.mixer.A_log"].element_size() == 4


def test_a_standard_run_becomes_official_without_folding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.tiny_model(
        "sambay+da", dtype=torch.float32, parametrization="standard", norm="layer",
        attention_bias=True, num_heads=6, num_kv_heads=2,
    )  # fmt: skip
    theirs = archscale_names(model)
    torch.save(theirs, tmp_path / "x.pth")
    arguments = ("--to", "official", "--parametrization", "standard", "--window", 5)
    code, out, _ = run(capsys, tmp_path / "x.pth", tmp_path / "official", *arguments)
    assert code == 0
    assert "folding" not in out
    stored = load_file(tmp_path / "official" / "model.safetensors")
    assert len(stored) == len(theirs) - 1  # the head is the embedding
    for part in ("weight", "bias"):
        grouped = theirs[f"transformer.h.1.attn.attn.{part}"].unflatten(0, (2, 3 + 2, 6))
        queries, keys, values = grouped[:, :3], grouped[:, 3], grouped[:, 4]
        rows = [queries.flatten(0, 2), keys.flatten(0, 1), values.flatten(0, 1)]
        assert torch.equal(stored[f"model.layers.1.attn.Wqkv.{part}"], torch.cat(rows))
    renamed = {
        "model.layers.7.attn.Wqkv.weight": "transformer.h.7.attn.attn.weight",
        "model.layers.6.attn.in_proj.weight": "transformer.h.6.attn.gmu.in_proj.weight",
        "model.layers.0.attn.conv1d.weight": "transformer.h.0.attn.conv1d.weight",
        "model.layers.3.attn.inner_cross_attn.subln.weight": "transformer.h.3.attn.da.subln.weight",
        "model.layers.5.mlp.fc1.weight": "transformer.h.5.mlp.w1.weight",
        "model.final_layernorm.bias": "transformer.ln_f.bias",
    }
    for official_name, archscale_name in renamed.items():
        assert torch.equal(stored[official_name], theirs[archscale_name]), official_name


def test_rounding_that_the_official_format_brings_is_told(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = "stores D and dt_proj.bias of Mamba layers in bfloat16: some of them are rounded"
    common = ("--to", "official", *ARCHSCALE, "--fold-multipliers", "--dtype")
    assert note in run(capsys, run_file, tmp_path / "a", *common, "bfloat16")[1]
    assert note not in run(capsys, run_file, tmp_path / "b", *common, "float32")[1]
    exact = (tmp_path / "a", tmp_path / "c", "--to", "official")  # rounded already
    assert note not in run(capsys, *exact)[1]


def test_a_model_that_does_not_fit_is_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model_folder(tmp_path / "native", tiny.tiny_model("sambay", dtype=torch.float32))
    code, _, err = run(
        capsys, tmp_path / "native", tmp_path / "out", "--to", "official", "--fold-multipliers"
    )
    assert code == 2
    assert "model.norm = rms does not fit Phi4FlashForCausalLM" in err
    assert not (tmp_path / "out").exists()


MISTAKES: list[tuple[list[Any], str]] = [
    (["{tmp}/none", "{tmp}/out"], "none does not exist; give a model folder or a .pth file"),
    (["{tmp}", "{tmp}/out"], "holds no config.json; it is no model folder"),
    (["{run}", "{tmp}/out"], "holds no config.json; give the file itself, such as .*ckpt.pth"),
    (["{file}", "{tmp}/out"], "please give --parametrization .the name suggests mup.+, --window"),
    (["{official}", "{tmp}/out", "--window", "5"], "--window is a setting of ArchScale files"),
    (["{official}", "{official}", "--force"], "official is or holds SOURCE"),
    (["{official}/model.safetensors", "{official}", "--force"], "official is or holds SOURCE"),
    (["{official}", "{run}"], "is not empty; choose another folder or add --force"),
    (["{official}", "{run}", "--force"], "exists and is no model folder"),
    (["{official}", "{tmp}/out", "--tokenizer", "{tmp}"], "tokenizer.json does not exist; give a"),
    (["{official}", "{tmp}/out", "--max-shard-size", "much"], "much"),
    (["{official}", "{tmp}/out", "--from", "native"], "model_type"),
    (
        ["{official}/model.safetensors", "{tmp}/out"],
        "no ArchScale|cannot be read|damaged",
    ),
    (["{file}", "{tmp}/out", "--rope-base", "1e4", *ARCHSCALE, "--untied"], "the model is tied"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(
    arguments: list[Any], message: str, official_folder: Path, run_file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    names = {"tmp": tmp_path, "official": official_folder, "file": run_file}
    names["run"] = run_file.parent
    given = [str(argument).format(**names) for argument in arguments]
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run(capsys, *given, "--to", "native")
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert re.search(message, err), err
    assert sorted(tmp_path.rglob("*")) == before


def test_force_replaces_a_model_folder(
    official_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    save_model_folder(out, tiny.tiny_model("mambay", dtype=torch.float32))
    (out / "stray").write_text("old")
    assert run(capsys, official_folder, out, "--to", "native", "--force")[0] == 0
    assert read_config(out) == read_config(official_folder)
    assert not (out / "stray").exists()
