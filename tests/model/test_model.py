"""What holds for the whole model: causality, gradients, shared values, precision, roles."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sambay.errors import ConfigError
from sambay.layers.context import BatchContext, SharedStates
from sambay.layers.mamba import Mamba
from sambay.layers.roles import Role
from sambay.model import LanguageModel, initialise
from sambay.model.roles import parameter_roles
from sambay.ops.causal_conv import causal_conv
from sambay.ops.selective_scan import selective_scan
from tests.tiny import FAMILY, random_ids, tiny_config, tiny_model


@pytest.mark.parametrize("name", FAMILY)
@torch.no_grad()
def test_the_past_does_not_know_the_future(name: str) -> None:
    model = tiny_model(name)
    ids = random_ids(1, 25)
    changed = ids.clone()
    changed[:, 13] = (changed[:, 13] + 1) % 61
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :13], after[:, :13])
    assert not torch.allclose(before[:, 13:], after[:, 13:])


@pytest.mark.parametrize("name", FAMILY)
def test_no_output_depends_on_a_later_input(name: str) -> None:
    model = tiny_model(name)
    embedded = []
    model.embedding.register_forward_hook(lambda *call: embedded.append(call[2]))
    out = model(random_ids(1, 16))
    (grad,) = torch.autograd.grad(out[:, 9].square().sum(), embedded)
    assert grad[:, 10:].abs().max() == 0
    assert grad[:, 9].abs().max() > 0


@pytest.mark.parametrize("name", FAMILY)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = tiny_model(name)
    model(random_ids(2, 12)).square().sum().backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.abs().max() > 0, path


@pytest.mark.parametrize("name", FAMILY)
def test_recomputing_blocks_changes_nothing(name: str) -> None:
    model, ids = tiny_model(name), random_ids(2, 12)
    grads = []
    for recompute in ("none", "full", "selective"):
        model.zero_grad()
        model.recompute = recompute
        loss = model(ids).square().sum()
        loss.backward()
        grads.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for again in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], again, strict=True))


@pytest.mark.parametrize("name", ["sambay", "sambay-2", "s-gdny"])
def test_scans_are_kept_where_only_cheap_work_is_repeated(name: str) -> None:
    class CountScans(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            is_scan = str(op).startswith("sambay.") and "conv" not in str(op)
            self.calls += is_scan and "backward" not in str(op)
            return op(*args, **(kwargs or {}))

    model, counts = tiny_model(name), {}
    for recompute in ("full", "selective"):
        model.recompute = recompute
        with CountScans() as counter:
            model(random_ids(2, 12)).square().sum().backward()
        counts[recompute] = counter.calls
    assert counts == {"full": 6, "selective": 3}  # three recurrent layers


def test_cross_layers_teach_the_publisher_of_keys() -> None:
    """With everything else cut off, gradient still reaches layer h + 1's K, V from cross layers."""
    model = tiny_model("sambay")
    publisher, reader = model.blocks[5], model.blocks[7]
    context = BatchContext(0, 9)
    x = torch.randn(2, 9, 36, dtype=torch.float64)
    _, shared = publisher.mixer(x, context, SharedStates(), None)
    y, _ = reader.mixer(torch.randn_like(x), context, shared, None)
    (grad,) = torch.autograd.grad(y.square().sum(), publisher.mixer.kv_proj.weight)
    keys, values = grad.chunk(2)
    assert keys.abs().max() > 0
    assert values.abs().max() > 0


def test_gated_memory_teaches_the_publisher_of_memory() -> None:
    model = tiny_model("sambay")
    publisher, reader = model.blocks[4], model.blocks[6]
    context = BatchContext(0, 9)
    x = torch.randn(2, 9, 36, dtype=torch.float64)
    _, shared = publisher.mixer(x, context, SharedStates(), None)
    y, _ = reader.mixer(torch.randn_like(x), context, shared, None)
    inputs = [publisher.mixer.A_log, publisher.mixer.D, publisher.mixer.dt_bias]
    for grad in torch.autograd.grad(y.square().sum(), inputs):
        assert grad.abs().max() > 0


def test_the_memory_is_the_scan_output_with_skip_before_the_gate() -> None:
    model = tiny_model("sambay")
    mixer = model.blocks[4].mixer
    assert isinstance(mixer, Mamba)
    x = torch.randn(2, 9, 36, dtype=torch.float64)
    out, shared = mixer(x, BatchContext(0, 9), SharedStates(), None)
    u, z = mixer.in_proj(x).chunk(2, dim=-1)
    u = causal_conv(u, mixer.conv_weight, mixer.conv_bias, backend="reference")
    dt, B, C = mixer.x_proj(u).split(mixer.splits, dim=-1)
    y, _ = selective_scan(
        u,
        mixer.dt_proj(dt),
        -mixer.A_log.exp(),
        B,
        C,
        mixer.D,
        delta_bias_E=mixer.dt_bias,
        backend="reference",
    )
    torch.testing.assert_close(shared.memory, y)
    torch.testing.assert_close(out, mixer.out_proj(y * torch.nn.functional.silu(z)))


def test_a_normalised_unit_gates_first_and_norms_the_whole_memory() -> None:
    unit = tiny_model("gdny").blocks[6].mixer
    x, memory = torch.randn(2, 9, 36).double(), torch.randn(2, 11, 15).double()
    out, shared = unit(x, BatchContext(0, 9), SharedStates(memory=memory), None)
    gated = torch.nn.functional.silu(unit.in_proj(x)) * memory[:, 2:]
    scale = (gated.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(out, (gated * scale * unit.norm.weight) @ unit.out_proj.weight.T)
    assert shared.memory is memory


@pytest.mark.parametrize(
    ("name", "publisher"),
    [("sambay", 4), ("gdny", 4), ("sambay-a", 5), ("sambay-aa", 5), ("sambay-mlp", 5)],
)
def test_only_the_named_layer_publishes_memory(name: str, publisher: int) -> None:
    model = tiny_model(name)
    published = [
        index
        for index, block in enumerate(model.blocks)
        if getattr(block.mixer, "publishes_memory", False) or block.mlp.publishes_memory
    ]
    assert published == [publisher]


def test_the_residual_stream_is_float32_under_bfloat16() -> None:
    model = tiny_model("sambay+da", dtype=torch.bfloat16)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _args, out: seen.append(out[0].dtype))
    logits = model(random_ids(1, 7))
    assert logits.dtype is torch.bfloat16
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half()])
def test_ssm_parameters_stay_float32_bit_for_bit(cast) -> None:
    model = LanguageModel(tiny_config("sambay+da"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    cast(model)
    kept = ("A_log", ".D", "dt_bias", "lambda_")
    for name, parameter in model.named_parameters():
        if any(part in name for part in kept):
            assert torch.equal(parameter, before[name]), name
        else:
            assert parameter.dtype.itemsize == 2, name


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("fields", [{}, {"norm": "layer", "attention_bias": True}])
def test_every_parameter_has_a_role(name: str, fields: dict) -> None:
    model = LanguageModel(tiny_config(name, tie_embeddings=False, **fields))
    roles = parameter_roles(model)
    assert roles.keys() == dict(model.named_parameters()).keys()
    assert roles["embedding.weight"] is Role.EMBEDDING
    assert roles["head.weight"] is Role.OUTPUT
    for path, role in roles.items():
        expected = Role.MATRIX if path.endswith("proj.weight") else None
        assert expected is None or role is expected, path


def test_a_tied_head_is_one_parameter() -> None:
    model = LanguageModel(tiny_config("sambay"))
    assert model.head_weight is model.embedding.weight
    assert "head.weight" not in parameter_roles(model)


def test_multipliers_act_as_stored() -> None:
    config = tiny_config("sambay")
    ids = random_ids(1, 5)
    base = LanguageModel(config)
    doubled = LanguageModel(config.replace(logit_multiplier=2 * config.logit_multiplier))
    doubled.load_state_dict(base.state_dict())
    torch.testing.assert_close(doubled(ids), 2 * base(ids))
    silent = LanguageModel(config.replace(residual_multiplier=1e-30))
    silent.load_state_dict(base.state_dict())
    expected = silent.logits(silent.norm(silent.embedding(ids)) * config.logit_multiplier)
    torch.testing.assert_close(silent(ids), expected)


class TestInitialisation:
    def test_is_a_function_of_seed_and_name(self) -> None:
        first, second = (LanguageModel(tiny_config("sambay+da")) for _ in range(2))
        initialise(first, "standard", seed=3)
        initialise(second, "standard", seed=3)
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(a, b)
        initialise(second, "standard", seed=4)
        assert not torch.equal(first.embedding.weight, second.embedding.weight)
        names = [name for name, _ in first.named_parameters() if name.endswith("in_proj.weight")]
        values = [first.get_parameter(name).flatten()[0].item() for name in names]
        assert len(set(values)) == len(values)

    @pytest.mark.parametrize(
        ("scheme", "tied", "matrix", "residual"),
        [
            ("standard", True, 0.02, 0.02 / 4),
            ("standard", False, 0.02, 0.02 / 4),
            ("mup_published", True, 1 / 3**0.5, 1 / 3**0.5),
            ("mup_released", True, 1 / 3**0.5, 1 / 3**0.5 / 4),
            ("mup_released", False, 1 / 3**0.5, 1 / 3**0.5),
        ],
    )
    def test_the_table(self, scheme: str, tied: bool, matrix: float, residual: float) -> None:
        config = tiny_config("sambay", hidden_size=256, intermediate_size=512, tie_embeddings=tied)
        model = LanguageModel(config)
        initialise(model, scheme, seed=0)
        mup = scheme != "standard"

        def std(weight: torch.Tensor) -> float:
            return weight.std().item() * (weight.shape[1] ** 0.5 if mup else 1.0)

        assert std(model.blocks[0].mixer.in_proj.weight) == pytest.approx(matrix, rel=0.03)
        assert std(model.blocks[1].mixer.kv_proj.weight) == pytest.approx(matrix, rel=0.05)
        for block in model.blocks:
            assert std(block.mixer.out_proj.weight) == pytest.approx(residual, rel=0.05)
            assert std(block.mlp.out_proj.weight) == pytest.approx(residual, rel=0.05)
        assert model.embedding.weight.std().item() == pytest.approx(
            0.02 if tied else 1e-4, rel=0.05
        )
        if not tied:
            expected = 0.0 if mup else 0.02
            assert model.head.weight.std().item() == pytest.approx(expected, rel=0.05)

    def test_the_state_space_parameters(self) -> None:
        model = LanguageModel(tiny_config("sambay", hidden_size=256))
        mixer = model.blocks[2].mixer
        torch.testing.assert_close(mixer.A_log.exp(), torch.tensor([1.0, 2, 3]).expand(512, 3))
        assert torch.equal(mixer.D, torch.ones(512))
        dt = torch.nn.functional.softplus(mixer.dt_bias)
        assert dt.min() >= 0.99e-3
        assert dt.max() <= 0.101
        assert dt.log().mean().item() == pytest.approx(-4.6, abs=0.2)  # log-uniform
        assert mixer.conv_weight.abs().max() <= 0.5

    @pytest.mark.parametrize(
        ("name", "least", "mean"), [("sambay-2", 1.0, 8.5), ("gdny", 0.0, 8.0)]
    )
    def test_decay_rates_of_heads_are_uniform(self, name: str, least: float, mean: float) -> None:
        config = tiny_config(name, layer_pattern="M F G", recurrent_heads=3000)
        model = LanguageModel(config)
        initialise(model)
        mixer = model.blocks[0].mixer
        rates = mixer.A_log.exp()
        assert max(least, 0.99e-4) <= rates.min() < least + 0.1
        assert 15.9 < rates.max() <= 16.001
        assert rates.mean().item() == pytest.approx(mean, rel=0.02)
        dt = torch.nn.functional.softplus(mixer.dt_bias)
        assert 0.99e-3 <= dt.min() < 1.1e-3
        assert 0.09 < dt.max() <= 0.101
        assert 0.4 < mixer.conv_weight.abs().max() <= 0.5
        assert torch.equal(mixer.norm.weight, torch.ones(15_000))
        assert torch.equal(model.blocks[2].mixer.norm.weight, torch.ones(15_000))

    def test_unknown_scheme(self) -> None:
        with pytest.raises(ConfigError, match="did you mean 'standard'"):
            initialise(LanguageModel(tiny_config("sambay")), "standart")


def test_one_batch_can_be_learnt_by_heart() -> None:
    model = tiny_model("sambay", dtype=torch.float32)
    ids = random_ids(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        logits = model(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
