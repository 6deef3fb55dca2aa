"""Steps replayed on the CPU give, to the bit, what plain ones give, or say why they are plain."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sambay.generate import Request, SlotEngine
from sambay.generate.decode_step import DecodeStep
from sambay.generate.memory import captured_bytes
from sambay.model import LanguageModel
from sambay.model.slots import SlotCache
from sambay.ops.decode import skinny_linear
from sambay.ops.native.library import why_unavailable
from sambay.ops.native.recording import Recorder
from tests.tiny import VOCAB, random_ids, tiny_model

pytestmark = [
    pytest.mark.skipif(why_unavailable() is not None, reason="no C++ kernels here"),
    pytest.mark.usefixtures("plenty"),
]
DTYPES = [torch.float32, torch.bfloat16]
RECORDABLE = [
    "transformer++", "transformer-ls", "samba", "swa+yoco", "samba+yoco", "sambay", "sambay+da",
    "mambay",
]  # fmt: skip
SLOTS, CAPACITY = 3, 24


class Twins:
    """The same slots twice, stepped plainly and by replay."""

    def __init__(self, model: LanguageModel, dtype: torch.dtype) -> None:
        self.model = model
        self.caches = [SlotCache(model, SLOTS, CAPACITY, dtype) for _ in range(2)]
        self.steps = [
            DecodeStep(model, cache, capture=capture)
            for cache, capture in zip(self.caches, (False, True), strict=True)
        ]
        assert self.steps[1].why_not_captured is None

    @torch.inference_mode()
    def fill(self, slot: int, length: int) -> None:
        """Begin another text in a slot."""
        prompt = random_ids(1, length, seed=length)
        for cache, step in zip(self.caches, self.steps, strict=True):
            self.model(prompt, cache=cache.empty(slot), outputs="last")
            cache.set_length(slot, length)
            step.tokens_B[slot] = int(prompt[0, -1])

    def run(self, width: int, count: int) -> None:
        """Take steps, whose logits are the same."""
        for _ in range(count):
            plain, captured = (step.run(width) for step in self.steps)
            held = self.caches[0].lengths_B[:width] > 0
            assert torch.isfinite(plain[held]).all()
            assert torch.equal(plain, captured)
            for step, logits in zip(self.steps, (plain, captured), strict=True):
                step.tokens_B[:width] = logits.argmax(-1)

    def assert_equal(self) -> None:
        """What the slots hold is the same."""
        first, second = self.caches
        assert torch.equal(first.lengths_B, second.lengths_B)
        for mine, theirs in zip(first.layers(SLOTS), second.layers(SLOTS), strict=True):
            if mine.state is not None and theirs.state is not None:
                for name, buffer in mine.state.buffers.items():
                    assert torch.equal(buffer, theirs.state.buffers[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RECORDABLE)
def test_replayed_steps_equal_plain_ones(name: str, dtype: torch.dtype) -> None:
    twins = Twins(tiny_model(name, dtype=dtype), dtype)
    twins.fill(0, 7)
    twins.run(1, 3)
    twins.fill(1, 2)
    twins.fill(2, 5)
    twins.run(3, 4)  # some pass the window of 5
    for cache in twins.caches:
        cache.set_length(0, 0)
    twins.run(3, 2)
    twins.fill(0, 3)  # refilled: what was there before is not seen
    twins.run(3, 2)
    twins.run(1, 2)  # the first recording, after the memory was used by the other
    twins.assert_equal()


@pytest.mark.parametrize("name", ["sambay+da", "transformer++"])
def test_requests_get_the_same_tokens(name: str) -> None:
    model = tiny_model(name, dtype=torch.float32)
    requests = [
        Request(random_ids(1, 1 + 3 * i % 8, seed=i)[0].tolist(), 2 + 4 * i % 7) for i in range(7)
    ]
    found = []
    for capture in (False, True):
        engine = SlotEngine(model, slots=2, capacity=16, capture=capture)
        found.append([done.tokens for done in engine.generate(requests)])
    assert found[0] == found[1]
    assert engine.step_mode == "captured"


def test_parameters_may_change_in_place() -> None:
    model = tiny_model("sambay", dtype=torch.float32)
    twins = Twins(model, torch.float32)
    twins.fill(0, 4)
    twins.run(1, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    twins.run(1, 2)


def test_another_number_of_threads_is_recorded_for_itself() -> None:
    twins = Twins(tiny_model("sambay", dtype=torch.float32), torch.float32)
    twins.fill(0, 4)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            twins.run(1, 2)
    finally:
        torch.set_num_threads(before)
    assert {key[1] for key in twins.steps[1]._recordings} >= {1, 2}


class Adapted(nn.Module):
    """A linear map with something added, as adapters have it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.added = base, nn.Parameter(torch.randn(base.out_features) / 10)
        self.weight = base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.added


@contextmanager
def messages(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    with caplog.at_level(logging.INFO, logger="sambay.generate"):
        found: list[str] = []
        yield found
    found += [record.getMessage() for record in caplog.records]


def adapt(model: LanguageModel) -> None:
    mlp: Any = model.blocks[3].mlp
    mlp.out_proj = Adapted(mlp.out_proj)


def widen_norm(model: LanguageModel) -> None:
    norm: Any = model.blocks[2].mlp_norm
    norm.weight = nn.Parameter(norm.weight.double())


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("sambay", adapt, "it computes aten.add outside the decode operations"),
        ("sambay", widen_norm, "it computes aten.to outside the decode operations"),
        ("sambay-2", None, "it computes aten."),
        ("s-gdny", None, "it computes aten."),
    ],
)
def test_what_cannot_be_recorded_is_named_and_steps_plainly(name, change, reason, caplog) -> None:
    model = tiny_model(name, dtype=torch.float32)
    if change is not None:
        change(model)
    if change is widen_norm:
        model.blocks[2].mlp.to(torch.float64)
    requests = [Request([1, 2, 3], 6), Request([4], 5), Request([5, 6], 4)]
    with messages(caplog) as said:
        engine = SlotEngine(model, slots=2, capacity=8)
    assert engine.step_mode.startswith(f"plain ({reason}")
    assert sum("not replayed" in message for message in said) == 1
    plain = SlotEngine(model, slots=2, capacity=8, capture=False)
    assert [c.tokens for c in engine.generate(requests)] == [
        c.tokens for c in plain.generate(requests)
    ]
    assert not engine._step._recordings


def test_wider_steps_than_the_kernels_serve_are_plain_and_say_so() -> None:
    model = tiny_model("transformer++", dtype=torch.float32)
    engine = SlotEngine(model, slots=33, capacity=4)
    assert engine.step_mode == "captured"
    engine.generate([Request([i % VOCAB], 3) for i in range(33)])
    reason = "of 33 slots: it computes aten.linear outside the decode operations"
    assert engine.step_mode == f"plain ({reason})"


def test_the_reference_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMBAY_REFERENCE", "1")
    model = tiny_model("transformer++", dtype=torch.float32)
    step = DecodeStep(model, SlotCache(model, 1, 4, torch.float32))
    assert step.why_not_captured is not None


def outside(x: Tensor, weight: Tensor) -> object:
    return x * 2


def read_on_the_host(x: Tensor, weight: Tensor) -> object:
    return x.sum().item() if x.numel() > 1 else x.item()


def write_in_place(x: Tensor, weight: Tensor) -> object:
    return x.add_(1)


def read_one(x: Tensor, weight: Tensor) -> object:
    return x[0, 0].item()


def leave_unwritten(x: Tensor, weight: Tensor) -> object:
    return x.new_empty(3)


@pytest.mark.parametrize(
    "also", [outside, read_on_the_host, write_in_place, read_one, leave_unwritten]
)
@torch.inference_mode()
def test_the_recorder_notices_whatever_a_replay_would_leave_out(also: Any) -> None:
    x, weight = torch.randn(2, 5), torch.randn(3, 5)
    with Recorder(2, 2, []) as recorder:
        also(skinny_linear(x.view(2, 5), weight)[:, 1:].flatten(1), weight)
    assert recorder.result() is None
    assert recorder.reason


@torch.inference_mode()
def test_a_recording_reads_and_writes_where_it_did() -> None:
    x, weight = torch.randn(2, 5), torch.randn(3, 5)
    buffers: list[Tensor] = []
    with Recorder(2, 4, buffers) as recorder:
        y = skinny_linear(x, weight)
    recording = recorder.result()
    assert recording is not None
    assert len(recording) == 1
    assert [buffer.nbytes for buffer in buffers] == [4 * 3 * 4]  # of the widest step
    x.copy_(torch.randn(2, 5))
    recording.replay()
    torch.testing.assert_close(y, x @ weight.T)


@pytest.mark.parametrize("name", ["sambay+da", "samba", "transformer++"])
def test_the_plan_holds_what_captured_steps_keep(name: str) -> None:
    model = tiny_model(name, dtype=torch.float32)
    step = DecodeStep(model, SlotCache(model, 3, 8, torch.float32))
    step.run(3)
    kept = sum(buffer.nbytes for buffer in step._buffers)
    assert 0.4 * captured_bytes(model.config, 3) < kept <= captured_bytes(model.config, 3)
