"""The chunked gated delta rule as a torch operator with a hand-written backward.

As an operator it is one node for `torch.compile`, activation checkpointing and autograd, with
shapes known without running it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sambay.ops.second_derivative import refuse_second_derivative

INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor beta, "
    "Tensor? initial_state, Tensor? resets, float scale"
)
_library = torch.library.Library("sambay", "FRAGMENT")


def define(
    name: str,
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, ...]],
    outputs_for: Callable[..., tuple[Tensor, ...]],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A differentiable function of the eight inputs, giving (o, final state).

    `forward(*inputs, save)` gives (o, final state, saved, saved), the latter two empty unless
    `save`; `outputs_for`, with the same arguments, gives uninitialised ones.
    `backward(do, dfinal, *inputs, saved, saved)` gives the gradients of q, k, v, log_decay, beta
    and the initial state (empty without one); do or dfinal may be None.
    """
    _library.define(f"{name}({INPUTS}, bool save) -> (Tensor, Tensor, Tensor, Tensor)")
    _library.define(
        f"{name}_backward(Tensor? do, Tensor? dfinal, {INPUTS}, Tensor changes, Tensor inverse)"
        f" -> ({', '.join(['Tensor'] * 6)})"
    )
    for op, implementation in ((name, forward), (f"{name}_backward", backward)):
        _library.impl(op, _without_autocast(implementation), "CompositeExplicitAutograd")

    torch.library.register_fake(f"sambay::{name}", outputs_for, lib=_library)

    @torch.library.register_fake(f"sambay::{name}_backward", lib=_library)
    def _(do, dfinal, q, k, v, log_decay, beta, initial_state, *others):  # pyright: ignore
        return gradients_for(q, k, v, log_decay, beta, initial_state)

    backward_op = getattr(torch.ops.sambay, f"{name}_backward").default

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)  # zeros for what was saved would cost a pass over memory
        ctx.scale = inputs[7]
        ctx.save_for_backward(*inputs[:7], *output[2:])

    def differentiate(ctx: Any, do: Tensor | None, dfinal: Tensor | None, *_: Any) -> Any:
        *inputs, changes, inverse = ctx.saved_tensors
        results = backward_op(do, dfinal, *inputs, ctx.scale, changes, inverse)
        *gradients, dinitial = results
        return *gradients, None if inputs[5] is None else dinitial, None, None, None

    torch.library.register_autograd(
        f"sambay::{name}", differentiate, setup_context=keep, lib=_library
    )

    refuse = refuse_second_derivative("the chunked gated delta rule", "reference")
    torch.library.register_autograd(f"sambay::{name}_backward", refuse, lib=_library)
    operator = getattr(torch.ops.sambay, name).default

    def scan(*inputs: Any) -> tuple[Tensor, Tensor]:
        differentiable = torch.is_grad_enabled() and any(
            isinstance(value, Tensor) and value.requires_grad for value in inputs
        )
        o, final_state, _, _ = operator(*inputs, differentiable)
        return o, final_state

    return scan


def gradients_for(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, ...]:
    """Uninitialised gradients of these inputs; that of a missing initial state is empty."""
    gradients = [tensor.new_empty(tensor.shape) for tensor in (q, k, v, log_decay, beta)]
    gradients.append(log_decay.new_empty(0 if initial_state is None else initial_state.shape))
    return tuple(gradients)


def _without_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, whose matrix products stay in the precision it chose."""

    @functools.wraps(implementation)
    def run(*inputs: Any) -> Any:
        device = inputs[2].device.type  # v in the forward, q in the backward
        if not torch.is_autocast_enabled(device):
            return implementation(*inputs)
        with torch.autocast(device, enabled=False):
            return implementation(*inputs)

    return run
