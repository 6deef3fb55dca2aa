"""ArchScale checkpoints in their own layout, made here from models of ours, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sambay.errors import CheckpointMismatch, ConfigError
from sambay.hf import archscale
from sambay.hf.archscale_config import Settings, suggestions
from sambay.hf.folding import fold_multipliers
from sambay.model import LanguageModel
from tests import tiny

GIVEN: dict[str, Any] = {"parametrization": "mup++", "window": 5, "head_dim": 6}
RENAMED = {
    "mixer_norm": "norm_1",
    "mlp_norm": "norm_2",
    "mlp.in_proj": "mlp.w1",
    "mlp.out_proj": "mlp.w3",
    "mixer.conv_": "attn.conv1d.",
    "mixer.dt_bias": "attn.dt_proj.bias",
    "mixer.maps.norm_weight": "attn.da.subln.weight",
    "mixer.maps.": "attn.da.",
}


def archscale_names(model: LanguageModel) -> dict[str, torch.Tensor]:
    """The model's tensors as ArchScale writes them; q, k and v put together head by head."""
    config = model.config
    size, group = config.head_dim, config.num_heads // config.num_kv_heads
    kinds = [layer.kind.value for layer in config.layers]
    ours = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    theirs: dict[str, torch.Tensor] = {
        "transformer.wte.weight": ours.pop("embedding.weight"),
        "lm_head.weight": ours.pop("head.weight"),
    }
    for name, tensor in ours.items():
        if name.startswith("norm."):
            theirs["transformer.ln_f." + name.removeprefix("norm.")] = tensor
            continue
        _, index, rest = name.split(".", 2)
        new = rest
        for old, other in RENAMED.items():
            new = new.replace(old, other)
        if kinds[int(index)] in "SFC" and "mixer" in new:
            if "kv_proj" in new:
                continue
            new = new.replace("mixer.out_proj", "attn.proj").replace("mixer.q_proj", "attn.attn")
            if "q_proj" in rest and kinds[int(index)] != "C":
                keys_and_values = ours[name.replace("q_proj", "kv_proj")]
                rows = []
                for head in range(config.num_kv_heads):
                    first = head * size
                    value = config.num_kv_heads * size + first
                    rows.append(tensor[head * group * size : (head + 1) * group * size])
                    rows.append(keys_and_values[first : first + size])
                    rows.append(keys_and_values[value : value + size])
                tensor = torch.cat(rows)
        if kinds[int(index)] == "G":
            new = new.replace("mixer.", "attn.gmu.")
        if new.endswith("conv1d.weight"):
            tensor = tensor.unsqueeze(1)
        theirs[f"transformer.h.{index}." + new.replace("mixer.", "attn.")] = tensor
    return theirs


def saved(path: Path, tensors: dict[str, Any], **entries: Any) -> Path:
    torch.save({"model": tensors, "iter_num": 3, "hparams": {"lr": 1e-3}, **entries}, path)
    return path


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # preset: fields of the model, what must be given beside or instead of GIVEN
    "sambay": ({}, {}),
    "sambay+da": ({}, {"head_dim": None}),
    "mambay": ({}, {"window": None, "head_dim": None, "num_kv_heads": 4}),
    "sambay-a": ({}, {"head_dim": None, "num_heads": 8}),
    "sambay-aa": ({"memory_source": "attention"}, {}),
    "sambay-mlp": ({}, {}),
    "samba+yoco": ({}, {}),
    "swa+yoco": ({"d_state": 16}, {"rope_base": 10_000.0}),
    "transformer++": ({"d_state": 16}, {"rope_base": 1e4, "layer_pattern": "8xF", "window": None}),
    "transformer-ls": ({"d_state": 16}, {"rope_base": 1e4, "layer_pattern": "2x(S S S F)"}),
    "samba": ({}, {"rope_base": 1e4, "layer_pattern": "4x(M S)"}),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_every_member_is_read_with_the_same_config_and_tensors(name: str, tmp_path: Path) -> None:
    fields, given = CASES[name]
    model = tiny.tiny_model(name, dtype=torch.float32, **fields)
    path = saved(tmp_path / "iter-000003-ckpt.pth", archscale_names(model))
    loaded = archscale.load(path, Settings(**(GIVEN | given)))
    assert loaded.config == model.config
    for tensor_name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[tensor_name], tensor), tensor_name
    ids = tiny.random_ids(2, 11)
    assert torch.equal(loaded(ids), model(ids))
    assert loaded.head.weight is loaded.embedding.weight


@torch.no_grad()
def test_options_that_shapes_tell(tmp_path: Path) -> None:
    model = tiny.tiny_model(
        "sambay+da", dtype=torch.float32, norm="layer", attention_bias=True, tie_embeddings=False,
        d_conv=3, dt_rank=2, expand=3,
    )  # fmt: skip
    tensors = archscale_names(model)
    wrapped = {f"_forward_module._orig_mod.{name}": tensor for name, tensor in tensors.items()}
    path = tmp_path / "bare.pth"
    torch.save(wrapped, path)  # without the `model` entry
    loaded = archscale.load(path, Settings(**GIVEN, tied=False), torch.bfloat16)
    assert loaded.config == model.config
    assert loaded.head.weight.dtype is torch.bfloat16
    assert torch.equal(loaded.blocks[0].mixer.A_log, model.blocks[0].mixer.A_log)


@pytest.mark.parametrize(
    ("scheme", "residual", "logit"), [("mup++", 0.25, 2), ("mup", 1, 2), ("standard", 1, 1)]
)
def test_multipliers_follow_the_parametrization(
    scheme: str, residual: float, logit: float, tmp_path: Path
) -> None:
    model = tiny.tiny_model("sambay", dtype=torch.float32)
    path = saved(tmp_path / "x.pth", archscale_names(model))
    config = archscale.load(path, Settings(**(GIVEN | {"parametrization": scheme}))).config
    assert (config.residual_multiplier, config.logit_multiplier) == (residual, logit)
    usual = 6**-0.5
    assert config.attention_scale == pytest.approx(
        usual if scheme == "standard" else usual * 128**0.5 / 6**0.5
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["sambay", "sambay+da", "sambay-a"])
@torch.no_grad()
def test_folding_multipliers_changes_no_logit(name: str, tied: bool) -> None:
    model = tiny.tiny_model(
        name, norm="layer", attention_bias=True, tie_embeddings=tied, embedding_multiplier=1.75
    )
    torch.nn.init.normal_(model.head.weight)  # not zero, as it starts where it is not tied
    folded = fold_multipliers(model)
    config = folded.config
    assert {config.residual_multiplier, config.logit_multiplier, config.embedding_multiplier} == {1}
    assert config.attention_scale == pytest.approx(6**-0.5)
    assert (folded.head.weight is folded.embedding.weight) is tied
    ids = tiny.random_ids(2, 11)
    wanted = model(ids)
    assert model.config.residual_multiplier == 0.25  # the source is as it was
    torch.testing.assert_close(folded(ids), wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))
    unfolded = LanguageModel(config).double().eval()
    unfolded.load_state_dict(model.state_dict())
    assert not torch.allclose(unfolded(ids), wanted, rtol=0.01)  # the factors matter


@pytest.fixture
def sambay(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    tensors = archscale_names(tiny.tiny_model("sambay", dtype=torch.float32))
    folder = tmp_path / "scaling_mup_tie_sambay_d8_ctx4096_swa5"
    folder.mkdir()
    return saved(folder / "iter-000003-ckpt.pth", tensors), tensors


def test_all_missing_settings_are_asked_for_at_once_with_what_the_name_suggests(
    sambay: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    with pytest.raises(ConfigError) as raised:
        archscale.load(sambay[0], Settings())
    assert str(raised.value) == (
        f"{sambay[0]} does not store everything; please give --parametrization (the name suggests "
        "mup++), --window (the name suggests 5), --head-dim (128 in the published models)"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sp_tie_swayoco_d8_rbase_ctx32768", {"parametrization": "standard", "rope_base": 640_000}),
        ("scaling_ori_mup_tie_sambay_d8", {"parametrization": "mup"}),
        ("mup_sambay_d16_swa128", {"parametrization": "mup++", "window": 128}),
    ],
)
def test_suggestions_of_run_names(name: str, expected: dict[str, Any]) -> None:
    assert suggestions(Path(name) / "iter-000003-ckpt.pth") == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"head_dim": 5}, "--head-dim 5 does not divide the attention widths 48 and 24"),
        ({"num_heads": 7}, "--num-heads 7 does not divide the width 48"),
        ({"num_heads": 4}, "--head-dim means heads of 6, --num-heads of 12; correct one of them"),
        ({"tied": False}, "--untied: .* is absent or equal to .* the model is tied"),
        ({"window": 0}, "model.window = 0"),
        ({"parametrization": "mup+"}, r"'mup\+' does not exist"),
        ({"layer_pattern": "8xF"}, r"FFFFFFFF does not fit .* M\?M\?M\?GC"),
        ({"memory_source": "mlp"}, "width 72 fit no memory here"),
    ],
)
def test_settings_that_contradict_the_tensors(
    given: dict[str, Any], message: str, sambay: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    with pytest.raises((ConfigError, CheckpointMismatch), match=message):
        archscale.load(sambay[0], Settings(**(GIVEN | given)))


@pytest.mark.parametrize("given", [{"window": 5}, {"memory_source": "mamba"}])
def test_settings_no_layer_has(given: dict[str, Any], tmp_path: Path) -> None:
    tensors = archscale_names(tiny.tiny_model("transformer++", dtype=torch.float32))
    path = saved(tmp_path / "x.pth", tensors)
    settings = GIVEN | {"window": None, "rope_base": 0.0, "layer_pattern": "8xF"} | given
    with pytest.raises(ConfigError, match=r"^--\S+: no layer of .* has one \(8xF\); leave it out"):
        archscale.load(path, Settings(**settings))


def test_full_attention_everywhere_needs_the_pattern(tmp_path: Path) -> None:
    tensors = archscale_names(tiny.tiny_model("transformer-ls", dtype=torch.float32))
    path = saved(tmp_path / "x.pth", tensors)
    with pytest.raises(ConfigError, match=r"--layer-pattern \(shapes say \?{8}, \? being S or F\)"):
        archscale.load(path, Settings(**GIVEN, rope_base=1e4))


def test_widths_that_fit_two_memories_need_the_source(tmp_path: Path) -> None:
    model = tiny.tiny_model("sambay-mlp", dtype=torch.float32, intermediate_size=72)
    path = saved(tmp_path / "x.pth", archscale_names(model))
    with pytest.raises(ConfigError, match=r"mamba and mlp are all 72 wide; .* --memory-source"):
        archscale.load(path, Settings(**GIVEN))
    config = archscale.load(path, Settings(**GIVEN, memory_source="mlp")).config
    assert config == model.config


LAYER = "transformer.h.6.attn."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({LAYER + "gmu.norm.weight": 72}, "layer 6 needs normalised gated memory units.*not have"),
        ({LAYER + "a_proj.weight": 72}, "layer 6 needs Gated DeltaNet layers"),
        ({"transformer.h.0.attn.A_log": 4}, "layer 0 needs Mamba-2 layers, which this package"),
        ({LAYER + "gmu.in_proj.weight": None}, "layer 6 needs a mixer of the tensors gmu.out_proj"),
        ({"transformer.h.2.attn.D": None}, "has nothing for 'blocks.2.mixer.D', .* incomplete"),
        ({"transformer.h.2.attn.D": 5}, r"has a tensor of shape \(5,\) for 'blocks.2.mixer.D'"),
        ({"transformer.h.0.mlp.w3.weight": None}, "misses tensor 'transformer.h.0.mlp.w3.weight'"),
        ({"transformer.extra": 5}, "tensor 'transformer.extra' is unknown"),
        ({"transformer.h.9.norm_1.weight": 36}, r"layers are missing; found \[0, .* 7, 9\]"),
        ({"transformer.wte.weight": None}, "has no tensor 'transformer.wte.weight'"),
        ({"lm_head.weight": 5}, "for 'head.weight', which needs"),
    ],
)
def test_files_that_do_not_fit(
    changes: dict[str, int | None], message: str, sambay: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    path, tensors = sambay
    for name, size in changes.items():
        tensors.pop(name, None)
        if size is not None:
            tensors[name] = torch.zeros(size)
    with pytest.raises(CheckpointMismatch, match=message):
        archscale.load(saved(path, tensors), Settings(**GIVEN))


class Attack:
    """Unpickled, this would create a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("where", ["model", "beside"])
def test_code_in_a_pickle_is_refused_and_never_run(where: str, tmp_path: Path) -> None:
    target = tmp_path / "created"
    path = tmp_path / "x.pth"
    attack = Attack(target)
    content = {"model": attack} if where == "model" else {"model": {}, "hparams": attack}
    torch.save(content, path)
    with pytest.raises(CheckpointMismatch, match=r"more than tensors \(.*open\)") as raised:
        archscale.load(path, Settings(**GIVEN))
    assert "\n" not in str(raised.value)
    assert not target.exists()
    with open(path, "rb"):  # the attack is real: a loader that trusts the file falls for it
        torch.load(path, weights_only=False)
    assert target.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; give an ArchScale"),
        (b"", "cannot be read as a torch checkpoint"),
        (b"not a checkpoint at all", "cannot be read|is damaged"),
        ("half", "cannot be read as a torch checkpoint"),
        ("folder", "cannot be read as a torch checkpoint"),
        ("list", "holds no state dict"),
        ("numbers", "entry 'model.x' is no tensor|entry 'x' is no tensor"),
    ],
)
def test_what_is_no_checkpoint(
    content: Any, message: str, tmp_path: Path, sambay: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    path = tmp_path / "x.pth"
    if content == "half":
        whole = sambay[0].read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif content == "folder":
        path.mkdir()
    elif content == "list":
        torch.save([torch.zeros(2)], path)
    elif content == "numbers":
        torch.save({"model": {"x": 1}}, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointMismatch, match=message) as raised:
        archscale.load(path, Settings(**GIVEN))
    assert re.fullmatch(r"[^\n]+", str(raised.value))
