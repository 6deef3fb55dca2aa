"""The Mamba layer on vLLM's pages equals this package's own, and each known trap would be seen.

A layer alone with pages and batches made here: what an engine would give it, in seconds.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sambay.layers.context import BatchContext, SharedStates
from sambay.layers.mamba import Mamba
from sambay.layers.state import RecurrentState
from sambay.spec.recurrent import state_shape
from tests.serve.served_models import NEEDS_VLLM, environment
from tests.tiny import tiny_config, tiny_model

pytestmark = NEEDS_VLLM
PAGES = 9


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    """What vLLM's layers ask for when they are built: groups of one process, a configuration."""
    environment()
    import socket

    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = VllmConfig()
    with set_current_vllm_config(config):
        init_distributed_environment(
            world_size=1, rank=0, local_rank=0, backend="gloo",
            distributed_init_method=f"tcp://127.0.0.1:{port}",
        )  # fmt: skip
        initialize_model_parallel(1)
        yield config
    cleanup_dist_env_and_memory()


def build(context: Any, name: str) -> tuple[Mamba, Any]:
    """Our layer with random weights, and the served one that loaded the same."""
    from sambay.serve.mamba import ServedMamba
    from sambay.serve.sharding import load_tensor
    from sambay.serve.weights import parameter_name

    model = tiny_model("sambay", dtype=torch.float32)
    config = model.config
    layer = next(x for x in config.layers if x.publishes_memory is not None)
    vllm_config = types.SimpleNamespace(
        model_config=types.SimpleNamespace(dtype=torch.float32),
        compilation_config=types.SimpleNamespace(static_forward_context={}),
    )
    served = ServedMamba(config, layer, vllm_config, name)
    parameters = dict(served.named_parameters())
    loaded = set()
    own = model.blocks[layer.index].mixer
    assert isinstance(own, Mamba)
    for key, tensor in own.state_dict().items():
        stored = f"model.blocks.{layer.index}.mixer.{key}"
        target = parameter_name(stored, config).rpartition(".mixer.")[2]
        load_tensor(parameters[target], tensor)
        loaded.add(target)
    assert loaded == parameters.keys()
    for module in served.modules():  # as vLLM does when all is loaded
        if hasattr(module, "quant_method"):
            module.quant_method.process_weights_after_loading(module)
    shape = state_shape(config)
    # Pages are not empty when they are given to a request: whoever had them left something there.
    served.kv_cache = (torch.full((PAGES, *shape.conv), 7.0), torch.full((PAGES, *shape.ssm), 7.0))
    return own, served


class Batches:
    """Requests that keep their page, and what our layer says of each alone."""

    def __init__(self, own: Mamba, served: Any) -> None:
        self.own, self.served = own, served
        self.states: dict[int, RecurrentState] = {}

    def step(self, decodes: Sequence[int], prefills: Sequence[tuple[int, int]]) -> float:
        """The error of one batch: pages that decode, and (page, tokens) of parts of prompts."""
        D = self.own.in_proj.in_features
        lengths = [1] * len(decodes) + [tokens for _, tokens in prefills]
        pages = [*decodes, *(page for page, _ in prefills)]
        x = torch.randn(sum(lengths), D)
        expected = []
        for page, part in zip(pages, x.split(lengths), strict=True):
            continues = page in self.states
            if not continues:
                shape = state_shape(tiny_config("sambay"))
                self.states[page] = RecurrentState(1, shape, torch.device("cpu"))
            y, shared = self.own(
                part[None], BatchContext(0, len(part)), SharedStates(), self.states[page]
            )
            expected.append((y[0], shared.memory[0]))
        started = [page in self.started for page, _ in prefills]
        self.started.update(pages)
        y, memory = self.served.mix(x, rows(decodes, prefills, started))
        return max(
            float((y - torch.cat([a for a, _ in expected])).abs().max()),
            float((memory - torch.cat([b for _, b in expected])).abs().max()),
        )

    @property
    def started(self) -> set[int]:
        """The pages that have a state."""
        return self.__dict__.setdefault("_started", set())


def rows(
    decodes: Sequence[int], prefills: Sequence[tuple[int, int]], started: Sequence[bool]
) -> Any:
    """A batch as vLLM describes it to Mamba-1 layers."""
    ends = torch.tensor([0, *(tokens for _, tokens in prefills)]).cumsum(0)
    return types.SimpleNamespace(
        num_decode_tokens=len(decodes),
        num_prefill_tokens=int(ends[-1]),
        state_indices_tensor_d=torch.tensor(decodes, dtype=torch.int32)[:, None],
        state_indices_tensor_p=torch.tensor([page for page, _ in prefills], dtype=torch.int32),
        query_start_loc_p=ends.to(torch.int32),
        has_initial_states_p=torch.tensor(started, dtype=torch.bool),
    )


STEPS: tuple[tuple[list[int], list[tuple[int, int]]], ...] = (
    ([], [(4, 7), (1, 1), (8, 33)]),  # prompts, one shorter than the convolution
    ([4], [(1, 2), (2, 5)]),  # one decodes, one goes on with its prompt, one is new
    ([8, 4, 2], [(1, 40)]),
    ([1, 2, 8, 4], []),
    ([2], []),  # a single one, on its page
    ([4, 2], []),
)


def errors(own: Mamba, served: Any) -> list[float]:
    batches = Batches(own, served)
    with torch.inference_mode():
        return [batches.step(*step) for step in STEPS]


def test_batches_of_prompts_and_single_tokens_equal_each_request_alone(context) -> None:
    assert max(errors(*build(context, "mixed"))) < 1e-5


def test_the_other_order_of_the_convolution_state(context, monkeypatch) -> None:
    from sambay.serve import recurrence

    own, served = build(context, "turned")
    conv, ssm = served.kv_cache
    served.kv_cache = (conv.transpose(1, 2).contiguous(), ssm)
    monkeypatch.setattr(recurrence, "is_conv_state_dim_first", lambda: True)
    assert max(errors(own, served)) < 1e-5


def test_trap_decay_without_its_exponential(context) -> None:
    own, served = build(context, "decay")
    served.A.data = -own.A_log.data.clone()
    assert max(errors(own, served)) > 1e-2


def test_trap_bias_of_the_time_step_added_twice(context, monkeypatch) -> None:
    own, served = build(context, "bias")
    inputs = served._scan_inputs

    def twice(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        delta, B, C = inputs(x)
        return delta + served.dt_bias, B, C

    monkeypatch.setattr(served, "_scan_inputs", twice)
    assert max(errors(own, served)) > 1e-2


def test_trap_convolution_state_read_in_the_wrong_order(context, monkeypatch) -> None:
    own, served = build(context, "order")

    def turned() -> tuple[Tensor, Tensor]:
        return served.kv_cache[0].flip(1), served.kv_cache[1]

    first = errors(own, served)[0]
    monkeypatch.setattr(served, "states", turned)
    found = errors(own, served)
    assert first < 1e-5
    assert max(found[1:]) > 1e-2  # seen only where a state is read


def test_trap_state_of_the_request_that_had_the_page_before(context, monkeypatch) -> None:
    own, served = build(context, "before")
    spans = served.spans
    monkeypatch.setattr(
        served, "spans", lambda rows: [(a, b, slot, True) for a, b, slot, _ in spans(rows)]
    )
    assert max(errors(own, served)) > 1e-2


def test_trap_warm_up_without_pages(context, monkeypatch) -> None:
    """vLLM runs the model once before there are pages and indices: all is defined, none is read."""
    from sambay.serve import recurrence

    own, served = build(context, "warm")
    served.kv_cache = (torch.tensor([]), torch.tensor([]))
    x = torch.randn(6, own.in_proj.in_features)
    for metadata in (None, {}):
        said = types.SimpleNamespace(attn_metadata=metadata)
        monkeypatch.setattr(recurrence, "get_forward_context", lambda said=said: said)
        output = torch.full((6, served.width + served.memory_size), float("nan"))
        with torch.inference_mode():
            served.forward_impl(x, output)
        assert torch.equal(output, torch.zeros_like(output))


def test_rows_behind_the_last_token_are_defined(context, monkeypatch) -> None:
    from sambay.serve import recurrence

    own, served = build(context, "padded")
    said = types.SimpleNamespace(attn_metadata={served.prefix: rows([], [(3, 4)], [False])})
    monkeypatch.setattr(recurrence, "get_forward_context", lambda: said)
    output = torch.full((6, served.width + served.memory_size), float("nan"))
    with torch.inference_mode():
        served.forward_impl(torch.randn(6, own.in_proj.in_features), output)
    assert output.isfinite().all()
    assert torch.equal(output[4:], torch.zeros_like(output[4:]))
    assert output[:4].abs().min() > 0


def test_states_and_parameters_of_the_recurrence_are_float32(context) -> None:
    from sambay.serve.model import SambaYForCausalLM

    _, served = build(context, "precision")
    for name in ("A", "D", "dt_bias"):
        assert getattr(served, name).dtype == torch.float32
    assert (served.A < 0).all()
    narrow = types.SimpleNamespace(model_config=types.SimpleNamespace(dtype=torch.bfloat16))
    dtypes = SambaYForCausalLM.get_mamba_state_dtype_from_config(narrow)
    assert dtypes == (torch.bfloat16, torch.float32)
