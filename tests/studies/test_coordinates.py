"""The coordinate check: it sees what the model computes, and muP++ is flat where SP is not."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sambay.cli.main import main
from sambay.errors import ConfigError
from sambay.model import LanguageModel
from sambay.ops.attention import attention
from sambay.spec import InitScheme, Parametrization
from sambay.studies.coordinates import (
    CheckSettings,
    Measure,
    Point,
    Reading,
    Sweep,
    check,
    random_batch,
    run_config,
)
from sambay.studies.coordinates_report import SweepResult, table, to_json
from sambay.studies.probes import activations, updates
from sambay.studies.slopes import FLAT, expected_slope, log_slope, slopes
from tests.tiny import random_ids, tiny_config, tiny_model

STANDARD, MUP, PLUS = Parametrization
SETTINGS = CheckSettings(head_dim=8, sequence_length=16, steps=3, threads=1)


def measured(
    sweep: Sweep, points: list[Point], which: list[Parametrization], **fields: Any
) -> SweepResult:
    settings = dataclasses.replace(SETTINGS, **fields)
    readings = check(settings, points, which, random_batch(settings))
    return SweepResult(sweep, settings, tuple(points), "random tokens", tuple(readings))


def test_width_is_flat_under_mup_plus_plus_and_not_under_the_standard() -> None:
    """The proof of the parametrisation: every activation that theory calls flat has slope < 0.1."""
    points = [Point(width, 8) for width in (32, 64, 128)]
    trained_with = {"init_scheme": InitScheme.MUP_RELEASED, "seeds": (0, 1)}
    result = measured(Sweep.WIDTH, points, [STANDARD, PLUS], **trained_with)
    checked = 0
    for measure, step in ((Measure.LEVEL, 0), (Measure.LEVEL, 3), (Measure.CHANGE, 3)):
        found = slopes(result.readings, Sweep.WIDTH, measure, step)
        for quantity, slope in found[PLUS].items():
            if result.expected(measure, quantity, step) == 0:
                assert abs(slope) < FLAT, (measure, step, quantity)
                checked += 1
    assert checked == 3 * 16  # all but the logits and the largest attention logit
    first = slopes(result.readings, Sweep.WIDTH, Measure.LEVEL, 0)
    # Random tied logits fall with the root of the width, until training adds up in phase.
    assert first[PLUS]["logits"] == pytest.approx(-0.5, abs=0.05)
    last = slopes(result.readings, Sweep.WIDTH, Measure.LEVEL, 3)[STANDARD]
    for quantity in ("mamba", "MLP", "attention logits", "gated memory unit"):
        assert last[quantity] > 0.5, quantity
    learned = slopes(result.readings, Sweep.WIDTH, Measure.UPDATE, 3)
    for quantity, slope in learned[STANDARD].items():
        if quantity not in ("embedding", "logits"):
            assert slope > 0.25, quantity
            assert learned[PLUS][quantity] < 0.2, quantity


def test_depth_keeps_the_residual_stream_under_mup_plus_plus_only() -> None:
    points = [Point(32, depth) for depth in (8, 24)]
    result = measured(Sweep.DEPTH, points, [MUP, PLUS], steps=2)
    found = slopes(result.readings, Sweep.DEPTH, Measure.LEVEL, 2)
    name = "residual at the end"
    assert abs(found[PLUS][name]) < 0.15
    assert found[MUP][name] > 0.4
    by_depth = slopes(result.readings, Sweep.DEPTH, Measure.UPDATE, 2)[PLUS]
    assert by_depth["MLP in_proj"] == pytest.approx(-0.5, abs=0.2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_wider_and_deeper_models_keep_the_promises() -> None:
    """Also what single weights learn is flat once the width is well above the tokens of a batch."""
    wide = [Point(width, 8) for width in (128, 256, 512)]
    # With eight tokens and few heads attention is noisy: two models leave slopes up to 0.2.
    few = {"batch_size": 1, "sequence_length": 8, "head_dim": 16, "seeds": tuple(range(6))}
    result = measured(Sweep.WIDTH, wide, [PLUS], **few)
    learned = slopes(result.readings, Sweep.WIDTH, Measure.UPDATE, 3)[PLUS]
    for quantity, slope in learned.items():
        # dt_proj reads a sixteenth of the width, so it is narrow for longer.
        if quantity not in ("logits", "mamba dt_proj"):
            assert abs(slope) < 0.15, quantity
    deep = [Point(64, depth) for depth in (8, 16, 32)]
    result = measured(Sweep.DEPTH, deep, [MUP, PLUS], seeds=(0, 1), head_dim=16)
    found = slopes(result.readings, Sweep.DEPTH, Measure.LEVEL, 3)
    for quantity, slope in found[PLUS].items():
        if result.expected(Measure.LEVEL, quantity, 3) == 0:
            assert abs(slope) < 0.15, quantity
    assert found[MUP]["residual at the end"] > 0.5


def test_rates_and_multipliers_follow_width_and_depth_apart() -> None:
    base, wider, deeper = Point(64, 8), Point(128, 8), Point(64, 32)
    for parametrization in Parametrization:
        at_base = run_config(SETTINGS, base, base, parametrization, 0)
        assert at_base.optimizer.peak_learning_rate == SETTINGS.learning_rate
        assert at_base.optimizer.matrix_learning_rate_factor == 1
        assert at_base.model.logit_multiplier == 1
    wide, deep = (run_config(SETTINGS, point, base, PLUS, 0) for point in (wider, deeper))
    assert wide.optimizer.matrix_learning_rate_factor == wide.model.logit_multiplier == 0.5
    assert wide.optimizer.peak_learning_rate == SETTINGS.learning_rate
    assert wide.model.residual_multiplier == pytest.approx(1 / 4)
    assert deep.optimizer.matrix_learning_rate_factor == deep.model.logit_multiplier == 1
    assert deep.optimizer.peak_learning_rate == pytest.approx(SETTINGS.learning_rate / 2)
    assert deep.model.residual_multiplier == pytest.approx(1 / 8)
    plain = run_config(SETTINGS, deeper, base, MUP, 0)
    assert plain.optimizer.peak_learning_rate == SETTINGS.learning_rate
    assert plain.model.residual_multiplier == 1
    standard = run_config(SETTINGS, wider, base, STANDARD, 0)
    assert standard.init_scheme is InitScheme.STANDARD
    assert standard.optimizer.matrix_learning_rate_factor == standard.model.logit_multiplier == 1


@pytest.mark.parametrize("name", ["sambay", "sambay+da", "sambay-mlp", "samba+yoco", "s-gdny"])
def test_probes_change_nothing_and_leave_nothing_behind(name: str) -> None:
    model = tiny_model(name, dtype=torch.float32)
    ids = random_ids(2, 9)
    with torch.no_grad():  # as the probes: so few rows have kernels of their own
        before = model(ids)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    first = {key: value.detach().clone() for key, value in model.named_parameters()}
    found = activations(model, ids)
    learned = updates(model, first, ids)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), before, rtol=0, atol=0)
    assert hooks == [len(module._forward_hooks) for module in model.modules()]
    assert not any(module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(found["logits"][0], before, rtol=0, atol=0)
    assert all(float(one.abs().max()) == 0 for tensors in learned.values() for one in tensors)
    linears = [one for one in model.modules() if isinstance(one, torch.nn.Linear)]
    assert sum(map(len, learned.values())) == len(linears) + 1  # and the embedding
    assert len(found["MLP"]) == model.config.num_layers


def test_probes_see_what_the_layers_compute() -> None:
    """Each captured value against the same value computed from the layers themselves."""
    model = tiny_model("sambay", dtype=torch.float32)
    ids = random_ids(2, 9)
    found = activations(model, ids)
    assert set(found) == {
        "embedding", "mamba x", "mamba delta", "mamba y", "mamba", "MLP", "window attention",
        "residual at 1/4 of the depth", "residual at 1/2 of the depth", "memory",
        "attention logits", "full attention", "gated memory unit", "cross-attention",
        "residual at the end", "final norm", "logits",
    }  # fmt: skip
    # The memory is the y of the last scan, and a unit with it gives what the block adds.
    torch.testing.assert_close(found["mamba y"][-1], found["memory"][0], rtol=0, atol=0)
    unit = model.blocks[6].mixer
    assert unit.in_proj.weight.shape[0] == found["memory"][0].shape[-1]
    torch.testing.assert_close(model.norm(found["residual at the end"][0]), found["final norm"][0])
    scan = model.blocks[0].mixer
    delta_low, delta_high = found["mamba delta"][0].aminmax()
    assert 0 < float(delta_low) < float(delta_high) < 2
    assert found["mamba x"][0].shape == (2, 9, scan.D.shape[0])
    # Attention logits: a softmax of them over the visible columns gives the layer's own output.
    full = model.blocks[5].mixer
    seen: list[tuple[Any, ...]] = []
    handle = full.maps.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    model(ids)
    handle.remove()
    q, k, v = seen[0][:3]
    visible = torch.ones(9, 9, dtype=torch.bool).tril()
    logits = torch.full((2, q.shape[1], 9, 9), -math.inf)
    logits[:, :, visible] = found["attention logits"][0]
    weights = F.softmax(logits, dim=-1)
    expected = attention(q, k, v, scale=full.maps.scale)
    torch.testing.assert_close(weights @ v.repeat_interleave(2, dim=1), expected)


def test_updates_are_the_learned_part_of_each_map() -> None:
    model = LanguageModel(tiny_config("sambay"))
    ids = random_ids(2, 9)
    first = {key: value.detach().clone() for key, value in model.named_parameters()}
    with torch.no_grad():
        model.blocks[3].mlp.out_proj.weight.mul_(1.5)
        model.embedding.weight.add_(0.25)
    inputs: list[torch.Tensor] = []
    handle = model.blocks[3].mlp.out_proj.register_forward_pre_hook(
        lambda _, one: inputs.append(one[0])
    )
    found = updates(model, first, ids)
    handle.remove()
    expected = F.linear(inputs[0], first["blocks.3.mlp.out_proj.weight"]) / 2
    torch.testing.assert_close(found["MLP out_proj"][3], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["embedding"][0], torch.full((2, 9, 36), 0.25))
    assert float(found["MLP in_proj"][3].abs().max()) == 0
    assert found["logits"][0].shape == (2, 9, model.config.vocab_size)  # of the tied matrix


def test_slopes() -> None:
    assert log_slope({8: [3.0], 16: [6.0], 64: [24.0]}) == pytest.approx(1.0)
    assert log_slope({8: [1.0, 4.0], 32: [1.0]}) == pytest.approx(-0.5)  # the mean of logs
    assert math.isnan(log_slope({8: [1.0], 16: [0.0]}))
    assert math.isnan(log_slope({8: [1.0], 16: [math.inf]}))
    place = (PLUS, 32, 8, 0, 0, Measure.LEVEL, "x")
    two = [Reading(*place, 1.0), dataclasses.replace(Reading(*place, 2.0), width=32, depth=16)]
    assert slopes(two, Sweep.DEPTH, Measure.LEVEL, 0) == {PLUS: {"x": pytest.approx(1.0)}}
    assert slopes(two, Sweep.DEPTH, Measure.CHANGE, 0) == {}


def test_what_theory_promises() -> None:
    level, change, update = Measure
    assert expected_slope(Sweep.WIDTH, level, "logits", 0) == -0.5
    assert expected_slope(Sweep.WIDTH, level, "logits", 3) is None
    assert expected_slope(Sweep.WIDTH, change, "embedding", 3) == 0
    assert expected_slope(Sweep.LADDER, change, "embedding", 3) == -0.5
    assert expected_slope(Sweep.DEPTH, update, "MLP in_proj", 3) == -0.5
    released = InitScheme.MUP_RELEASED
    assert expected_slope(Sweep.DEPTH, level, "mamba", 0, released) == -0.5
    assert expected_slope(Sweep.DEPTH, level, "mamba", 0) == 0
    assert expected_slope(Sweep.DEPTH, level, "mamba x", 0, released) == 0


def test_a_run_that_diverges_is_measured_as_such() -> None:
    points = [Point(32, 4), Point(64, 4)]
    result = measured(Sweep.WIDTH, points, [STANDARD], learning_rate=1e30)
    found = slopes(result.readings, Sweep.WIDTH, Measure.LEVEL, 3)[STANDARD]
    assert math.isnan(found["logits"])
    text = json.dumps(to_json(result), allow_nan=False)  # no NaN leaves the program
    assert '"slope": null' in text
    assert "muP++ was not measured." in table(result)


def test_command_prints_and_writes_the_same_slopes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "sambay+da --sweeps width --widths 32,64 --depths 4 --parametrizations mup++ --steps 1"
    options = f"--head-dim 8 --sequence-length 5 --threads 1 --out {tmp_path}"
    assert main(["scaling", "coord-check", *words.split(), *options.split()]) == 0
    printed = capsys.readouterr().out
    assert "4 x 5 random tokens" in printed
    report = json.loads((tmp_path / "width.json").read_text())
    assert report["points"] == [{"width": 32, "depth": 4}, {"width": 64, "depth": 4}]
    rows = {
        cells[1].strip(): cells
        for cells in (line.split("|") for line in printed.splitlines() if line.startswith("|"))
    }
    for entry in report["slopes"]:
        if entry["measure"] == "change" and entry["quantity"] == "window attention":
            assert float(rows["window attention"][4]) == pytest.approx(entry["slope"], abs=0.006)
    assert (tmp_path / "width.svg").exists()
    assert (tmp_path / "width.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("samby", "did you mean 'sambay'"),
        ("--widths 40,80", "needs a multiple of 32"),
        ("--widths 64", "at least two sizes"),
        ("--widths 64,wide", "--widths = 'wide'"),
        ("--sweeps width,widht", "did you mean"),
        ("--parametrizations ,", "names nothing"),
        ("--sweeps ladder --widths 66,99 --depths 8,12", "66 is no multiple"),
        ("--sweeps depth --depths 6,8", "depth = 6"),
        ("--steps 0", "--steps 0"),
        ("--init mup_releasd", "mup_released"),
        ("--device abacus", "--device abacus"),
        ("--data nowhere", "nowhere"),
    ],
)
def test_mistakes_are_said_before_anything_is_trained(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scaling", "coord-check", *words.split()]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1


def test_a_single_size_has_no_slope() -> None:
    with pytest.raises(ConfigError, match="two different sizes"):
        check(SETTINGS, [Point(32, 4), Point(32, 4)], [PLUS], random_batch(SETTINGS))
